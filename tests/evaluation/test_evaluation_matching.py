"""Re-ranking and pair scores against brute force, on one rank and on two, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.matching import find_candidates, reranked_metrics
from latentmodal.experiments.evaluation.retrieval import retrieval_metrics
from latentmodal.experiments.evaluation.run import Evaluator
from latentmodal.experiments.evaluation.sets import EvaluationSet, FeatureFile, Samples
from latentmodal.experiments.evaluation.tasks import (
    EvaluationConfig,
    ItmRetrievalTask,
    RetrievalTask,
    ToldApartTask,
    ZeroShotTask,
)


def brute_ranks(cosine_NM, logit_NM, owner, top_k):
    """Rank of the best own text of each image, and of the image of each text, by plain sorting."""
    num_images, num_texts = cosine_NM.shape

    def order(cosines, logits):
        best = sorted(range(len(cosines)), key=lambda place: -cosines[place])[:top_k]
        return sorted(best, key=lambda place: -(cosines[place] + logits[place]))

    of_images = []
    for image in range(num_images):
        own = [text for text in range(num_texts) if owner[text] == image]
        ranked = order(cosine_NM[image].tolist(), logit_NM[image].tolist())
        hits = [ranked.index(text) for text in own if text in ranked]
        if own:
            of_images.append(1 + min(hits) if hits else 1 + num_texts - len(own))
    of_texts = []
    for text in range(num_texts):
        ranked = order(cosine_NM[:, text].tolist(), logit_NM[:, text].tolist())
        found = owner[text] in ranked
        of_texts.append(1 + ranked.index(owner[text]) if found else num_images)
    return of_images, of_texts


@pytest.fixture
def scores():
    """Embeddings of nine images, the last without text, of eighteen texts, and their logits."""
    generator = torch.Generator().manual_seed(5)
    owner_M = torch.randint(8, (18,), generator=generator)
    owner_M[:8] = torch.arange(8)
    image_NVE = torch.randn(9, 3, 6, generator=generator)
    text_ME = image_NVE[owner_M, 1] + 1.5 * torch.randn(18, 6, generator=generator)
    return image_NVE, text_ME, owner_M, 2 * torch.randn(9, 18, generator=generator)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(("top_k", "chunk"), [(1, 100), (4, 100), (4, 5), (500, 7)])
def test_equals_brute_force(scores, top_k, chunk, several):
    image_NE, text_ME, owner_M, logit_NM = scores
    image_NE = image_NE if several else image_NE[:, 0]
    unit_ME = torch.nn.functional.normalize(text_ME, dim=-1)
    cosine_NM = torch.nn.functional.normalize(image_NE, dim=-1) @ unit_ME.T
    cosine_NM = torch.stack([row.amax(0) for row in cosine_NM]) if several else cosine_NM
    of_images, of_texts = brute_ranks(cosine_NM, logit_NM, owner_M.tolist(), top_k)
    scored = []

    def score(image_P, text_P):
        scored.extend(zip(image_P.tolist(), text_P.tolist(), strict=True))
        return logit_NM[image_P, text_P]

    ks = (1, 2, 5, 18)
    result = reranked_metrics(image_NE, text_ME, owner_M, score, ks=ks, top_k=top_k, chunk=chunk)
    assert result.image_to_text == {
        k: pytest.approx(sum(r <= k for r in of_images) / len(of_images)) for k in ks
    }
    assert result.text_to_image == {
        k: pytest.approx(sum(r <= k for r in of_texts) / len(of_texts)) for k in ks
    }
    assert len(set(scored)) == len(scored), "a pair is scored once"
    assert len(scored) <= top_k * (9 + 18)
    plain = retrieval_metrics(image_NE, text_ME, owner_M, ks=ks)
    assert result.chance_image_to_text == plain.chance_image_to_text
    assert result.chance_text_to_image == plain.chance_text_to_image
    assert (result.num_images, result.num_texts, result.num_queries) == (9, 18, 8)


def test_constant_logits_change_nothing_but_what_lies_below_the_candidates(scores):
    image_NE, text_ME, owner_M, _ = scores
    plain = retrieval_metrics(image_NE, text_ME, owner_M, ks=(1, 3))
    result = reranked_metrics(
        image_NE, text_ME, owner_M, lambda i, t: torch.zeros(len(i)), ks=(1, 3), top_k=3
    )
    assert (result.image_to_text, result.text_to_image) == (
        plain.image_to_text,
        plain.text_to_image,
    )


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_collapsed_model_scores_nothing(noise):
    """Neither among candidates chosen blindly nor by logits that are equal but for rounding."""
    points = torch.ones(20, 5)
    generator = torch.Generator().manual_seed(0)
    for top_k in (3, 50):
        result = reranked_metrics(
            points,
            points,
            torch.arange(20),
            lambda i, t: 7 + noise * torch.randn(len(i), generator=generator),
            ks=(1, 10),
            top_k=top_k,
        )
        assert result.image_to_text == result.text_to_image == {1: 0.0, 10: 0.0}


def test_candidates_are_cut_to_the_gallery(scores):
    image_NE, text_ME, owner_M, _ = scores
    found = find_candidates(image_NE, text_ME, owner_M, top_k=12)
    assert found.text_NK.shape == (9, 12)
    assert found.image_MK.shape == (18, 9)
    assert (found.text_cosine_NK.diff(dim=1) <= 1e-5).all()


@pytest.fixture(scope="module")
def direct(alignment_case, alignment_folder):
    """The system, its set, and everything computed in one go: features, cosines, texts."""
    system = alignment_case.build_system(alignment_folder)
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    data = EvaluationSet(system, source, LoaderConfig(batch_size=4))
    features_NLD, image_NVE = system.read_images(torch.stack(data.samples.pixels))
    texts = [text for own in data.samples.captions for text in own]
    owner_M = torch.tensor([row for row, own in enumerate(data.samples.captions) for _ in own])
    cosine_NM = (image_NVE @ system.embed_captions(texts).T).amax(1)
    logits = [system.match_scores(f.expand(len(texts), -1, -1), texts) for f in features_NLD]
    return system, source, features_NLD, cosine_NM, torch.stack(logits), owner_M, data.samples


@pytest.mark.parametrize("top_k", [3, 100])
def test_task_equals_brute_force(direct, top_k):
    system, source, _, cosine_NM, logit_NM, owner_M, _ = direct
    task = ItmRetrievalTask(source=source, ks=(1, 2, 5), top_k=top_k)
    data = EvaluationSet(system, source, LoaderConfig(batch_size=4), keep_features=True)
    section, _ = task.run(system, data)
    of_images, of_texts = brute_ranks(cosine_NM, logit_NM, owner_M.tolist(), top_k)
    for k in (1, 2, 5):
        expected = sum(rank <= k for rank in of_images) / len(of_images)
        assert section[f"image_to_text_R@{k}"].value == pytest.approx(expected)
        expected = sum(rank <= k for rank in of_texts) / len(of_texts)
        assert section[f"text_to_image_R@{k}"].value == pytest.approx(expected)
    protocol = section["text_to_image_R@1"].protocol
    assert f"the {top_k} best by cosine ordered by matching logit + cosine" in protocol
    assert not any("median" in name for name in section)


def test_first_captions_alone(direct):
    system, source, *_ = direct
    task = ItmRetrievalTask(source=source, captions="first")
    data = EvaluationSet(system, source, LoaderConfig(batch_size=4), keep_features=True)
    assert task.run(system, data)[0]["text_to_image_R@1"].n == 11


@pytest.mark.parametrize("by", ["similarity", "itm", "itg"])
def test_told_apart_equals_direct_scores(direct, by):
    system, source, features_NLD, *_, samples = direct
    rows = [row for row, meta in enumerate(samples.meta) if meta["negatives"]["relation_swap"]]
    true = [samples.captions[row][0] for row in rows]
    false = [samples.meta[row]["negatives"]["relation_swap"] for row in rows]
    if by == "similarity":
        image_PVE = system.embed_images(torch.stack([samples.pixels[row] for row in rows]))
        values = [
            (image_PVE @ system.embed_captions(texts)[:, :, None]).amax((1, 2))
            for texts in (true, false)
        ]
    else:
        score = system.match_scores if by == "itm" else system.caption_scores
        values = [score(features_NLD[rows], texts) for texts in (true, false)]
    expected = (values[0] > values[1]).float().mean().item()
    assert (values[0] - values[1]).abs().min() > 2e-4, "the case must not hang on a tie"
    assert 0 < expected < 1

    task = ToldApartTask(source=source, negatives=("relation_swap",), by=by)
    data = EvaluationSet(
        system, source, LoaderConfig(batch_size=4), keep_features=task.reads_features
    )
    section, _ = task.run(system, data)
    assert section["relation_swap"].value == pytest.approx(expected)
    assert section["relation_swap"].n == len(rows)
    words = {"similarity": "cosine", "itm": "matching logit", "itg": "log-likelihood"}
    assert words[by] in section["relation_swap"].protocol


def test_pictures_are_encoded_once(alignment_case, alignment_folder, monkeypatch):
    """Four tasks, embeddings and features, one pass; eleven pictures in batches of four."""
    system = alignment_case.build_system(alignment_folder)
    seen = []
    read, embed = system.read_images, system.embed_images
    monkeypatch.setattr(system, "read_images", lambda pixels: seen.append("read") or read(pixels))
    monkeypatch.setattr(system, "embed_images", lambda pixels: seen.append("e") or embed(pixels))
    monkeypatch.setattr(Evaluator, "_show", lambda *_: None)
    Evaluator(alignment_case.tasks(alignment_folder), system, {}).run(0)
    assert seen == ["read"] * 3


@pytest.mark.parametrize("by", ["similarity", "itm"])
def test_one_pass_gives_the_captions_too(alignment_case, alignment_folder, monkeypatch, by):
    system = alignment_case.build_system(alignment_folder)
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    passes = []
    each = EvaluationSet.each
    monkeypatch.setattr(EvaluationSet, "each", lambda *args: passes.append(1) or each(*args))
    task = ToldApartTask(source=source, negatives=("relation_swap",), by=by)
    data = EvaluationSet(
        system, source, LoaderConfig(batch_size=4), keep_features=task.reads_features
    )
    task.run(system, data)
    assert passes == [1]


def test_nothing_is_encoded_for_a_task_that_reads_batches_itself(direct):
    system, source, *_, samples = direct
    data = EvaluationSet(system, source, LoaderConfig(batch_size=4))
    assert data.each(lambda batch: batch.keys) == [f"{row:02d}" for row in range(11)]
    assert not data.is_embedded
    assert data.samples.captions == samples.captions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feature_file_gives_back_what_it_was_given(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    features_BLD = torch.randn(7, 5, 3).to(dtype)
    file = FeatureFile()
    assert [file.add(features_BLD[:4]), file.add(features_BLD[4:])] == [0, 4]
    places = torch.tensor([6, 0, 0, 3])
    assert torch.equal(file.rows(places), features_BLD[places])
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_with_a_remedy(monkeypatch):
    class Full:
        def write(self, _data: object) -> int:
            raise OSError(28, "No space left on device")

    file = FeatureFile()
    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(UserError, match=r"No space left.*set TMPDIR"):
        file.add(torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("off", "task", "message"),
    [
        ("itm", ItmRetrievalTask, "image-text matching .*objectives.itm above 0"),
        ("itm", lambda source: ToldApartTask(source=source, by="itm"), "image-text matching"),
        ("itg", lambda source: ToldApartTask(source=source, by="itg"), "grounded generation"),
        ("itc", RetrievalTask, "objectives.itc above 0"),
        ("itc", ItmRetrievalTask, "objectives.itc above 0"),
        ("itc", ToldApartTask, "objectives.itc above 0"),
        ("itc", ZeroShotTask, "objectives.itc above 0"),
    ],
)
def test_objective_that_is_off_is_refused_at_the_start(
    alignment_case, alignment_folder, off, task, message
):
    system = alignment_case.build_system(alignment_folder, **{off: 0.0})
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    config = EvaluationConfig(tasks={"mine": task(source=source)})
    with pytest.raises(UserError, match=f"evaluation.tasks.mine: .*{message}"):
        Evaluator(config, system, {})


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (ItmRetrievalTask, {"top_k": 0}, "top_k is 0"),
        (ItmRetrievalTask, {"captions": "some"}, "all or first"),
        (ToldApartTask, {"by": "guess"}, "choose from similarity, itm, itg"),
    ],
)
def test_fields_are_checked(task, fields, message):
    with pytest.raises(ValueError, match=message):
        task(source=ShardSourceConfig(urls="x"), **fields)


def test_set_without_captions_is_an_error(alignment_case, alignment_folder, monkeypatch):
    system = alignment_case.build_system(alignment_folder)
    samples = Samples(pixels=[], captions=[[], []], meta=[{}, {}])
    monkeypatch.setattr(EvaluationSet, "samples", samples)
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    for task in (RetrievalTask, ItmRetrievalTask):
        data = EvaluationSet(system, source, LoaderConfig(batch_size=4), keep_features=True)
        with pytest.raises(UserError, match="no sample has a caption"):
            task(source=source).run(system, data)


def test_scores_that_are_not_finite_are_an_error(alignment_case, alignment_folder, monkeypatch):
    system = alignment_case.build_system(alignment_folder)
    broken = torch.full((1,), torch.nan)
    monkeypatch.setattr(system, "match_scores", lambda _, texts: broken.expand(len(texts)))
    source = ShardSourceConfig(urls=str(alignment_folder / "shards"))
    config = EvaluationConfig(tasks={"mine": ItmRetrievalTask(source=source)})
    with pytest.raises(UserError, match="not finite"):
        Evaluator(config, system, {}).run(0)


def test_ranks_together_equal_one(alignment_case, alignment_folder, tmp_path):
    """Every metric, and as many calls of the matching model on each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("alignment_case.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, alignment_folder, tmp_path, "2", str(rank), str(port)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    one = alignment_case.evaluate(alignment_folder)
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "".join(errors)[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["values"] == second["values"] == pytest.approx(one["values"])
    assert first["calls"] == second["calls"] < one["calls"]
    assert first["longest"] == one["longest"] == 4
