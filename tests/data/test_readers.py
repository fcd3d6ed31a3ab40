"""Tiny files of the published layouts, through the import command's road, to batches."""

from __future__ import annotations

from itertools import chain

import pytest
from typer.testing import CliRunner

from latentmodal.experiments import cli
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import EvalLoader, TrainLoader
from latentmodal.experiments.data.readers import READERS
from latentmodal.experiments.errors import UserError
from published_layouts import (
    COCO,
    COCO_CAPTIONS,
    COCO_FILES,
    COCO_LIST,
    COCO_LIST_EVAL,
    FLAT_FILES,
    GQA,
    KARPATHY_COCO,
    KARPATHY_FLICKR,
    NOCAPS,
    OKVQA_ANNOTATIONS,
    VG_CAPTIONS,
    VG_FILES,
    VG_LIST,
    VG_REGIONS,
    VQA,
    VQA_ANNOTATIONS,
    questions,
)


@pytest.mark.parametrize(
    ("layout", "content", "files", "expected"),
    [
        ("karpathy", KARPATHY_COCO, COCO_FILES, {"coco/42": ["A cat.", "One cat "]}),
        ("karpathy", KARPATHY_COCO, FLAT_FILES, {"coco/42": ["A cat.", "One cat "]}),
        ("coco_captions", COCO, FLAT_FILES, COCO_CAPTIONS),
        ("coco_captions", COCO_LIST, COCO_FILES, COCO_CAPTIONS),
        ("coco_captions", COCO_LIST_EVAL, FLAT_FILES, COCO_CAPTIONS),
        ("vg_captions", VG_REGIONS, VG_FILES, VG_CAPTIONS),
        ("vg_captions", VG_LIST, VG_FILES, VG_CAPTIONS),
        ("nocaps", NOCAPS, ["images/0013ea2087020901.jpg"], {"nocaps/0": ["A baby."]}),
    ],
)
def test_captions(run, put, tmp_path, layout, content, files, expected):
    put(*files)
    done, samples = run(layout, content, split="train")
    assert {s["json"]["image_id"]: s["json"]["captions"] for s in samples} == expected
    assert [s["json"]["image_id"] for s in samples] == list(expected)
    assert {s["json"]["split"] for s in samples} == {"train"}
    assert done.samples == len(expected) and done.shards == 1 and done.questions == 0
    assert done.captions == sum(map(len, expected.values())) and done.skipped == ""
    originals = {(tmp_path / name).read_bytes() for name in files}
    assert len({s["jpg"] for s in samples} & originals) == len(samples)
    assert samples[0]["jpg"] == (tmp_path / files[0]).read_bytes()
    assert [s["json"].get("domain") for s in samples] == (
        ["near-domain"] if layout == "nocaps" else [None] * len(samples)
    )


def test_karpathy_splits(run, put, tmp_path, caplog):
    put(*COCO_FILES)
    with caplog.at_level("INFO"):
        run("karpathy", KARPATHY_COCO, split="train")
    assert "1 images of split restval" in caplog.text
    caplog.clear()
    _, samples = run("karpathy", KARPATHY_COCO, split="train+restval", out=tmp_path / "both")
    assert [s["json"]["image_id"] for s in samples] == ["coco/42", "coco/73"]
    assert {s["json"]["split"] for s in samples} == {"train"} and "restval" not in caplog.text
    with pytest.raises(UserError, match=r"no split 'val'; choose from restval, test, train"):
        run("karpathy", KARPATHY_COCO, split="val", out=tmp_path / "none")
    put("images/1000092795.jpg")
    _, (flickr,) = run("karpathy", KARPATHY_FLICKR, split="test", out=tmp_path / "flickr")
    assert flickr["json"]["image_id"] == "flickr30k/0"


@pytest.mark.parametrize("files", [COCO_FILES, FLAT_FILES])
def test_vqav2(run, put, files):
    put(*files)
    done, samples = run("vqav2", VQA_ANNOTATIONS, questions("val2014"))
    assert (done.samples, done.captions, done.questions) == (2, 0, 3)
    first, second = (s["json"] for s in samples)
    assert first["image_id"] == "coco/42" and first["captions"] == []
    assert first["questions"] == [
        {
            "question": "What is it?",
            "question_id": 1,
            "answer": "cat",
            "answers": ["cat"] * 9 + ["else"],
            "kind": "other",
        },
        {
            "question": "How many?",
            "question_id": 3,
            "answer": "2",
            "answers": ["2"] * 9 + ["else"],
            "kind": "number",
        },
    ]
    assert [q["question_id"] for q in second["questions"]] == [2]


def test_vqav2_tests_have_no_answers_and_test_dev_shares_the_pictures(run, put):
    put(*(f"images/test2015/COCO_test2015_{n:012d}.jpg" for n in (42, 73)))
    _, samples = run("vqav2", None, questions("test-dev2015"), split="test-dev")
    asked = [q for s in samples for q in s["json"]["questions"]]
    assert [set(q) for q in asked] == [{"question", "question_id"}] * 3


def test_okvqa_takes_the_commonest_answer(run, put):
    put(*FLAT_FILES)
    _, samples = run("okvqa", OKVQA_ANNOTATIONS, questions("val2014"))
    question = samples[1]["json"]["questions"][0]
    assert question["answer"] == "ride" and len(question["answers"]) == 5
    assert question["kind"] == "Sports and Recreation"


def test_gqa(run, put):
    put("images/2354786.jpg", "images/n161313.jpg")
    done, samples = run("gqa", None, GQA)
    assert done.questions == 3
    assert [s["json"]["image_id"] for s in samples] == ["vg/2354786", "gqa/n161313"]
    assert samples[0]["json"]["questions"] == [
        {
            "question": "Is the sky dark?",
            "question_id": "02930152",
            "answer": "yes",
            "kind": "verify",
        },
        {"question": "Which color?", "question_id": "07333409", "answer": "gray"},
    ]


def test_the_same_files_give_the_same_bytes(run, put, tmp_path):
    put(*COCO_FILES)
    for name in ("a", "b"):
        run("coco_captions", COCO_LIST, out=tmp_path / name)
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


def test_shards_are_served_by_both_loaders(run, put, tmp_path, to_pixels):
    put(*COCO_FILES)
    run("coco_captions", COCO_LIST, out=tmp_path / "captions")
    run("vqav2", VQA_ANNOTATIONS, questions("val2014"), out=tmp_path / "vqa")
    sources = [ShardSourceConfig(urls=str(tmp_path / name)) for name in ("captions", "vqa")]
    config = LoaderConfig(batch_size=2, workers=0, shuffle_window=4)
    (first, second) = EvalLoader(sources, config, image_transform=to_pixels)
    assert first.all_captions == [["A cat.", "One cat"], ["A dog."]]
    assert first.captions == ["A cat.", "A dog."] and first.draws == [0, 0]
    assert second.captions == ["", ""] and second.all_captions == [[], []]
    assert [m["image_id"] for m in first.meta] == [m["image_id"] for m in second.meta]
    assert second.meta[1]["questions"][0]["answer"] == "no"
    train = TrainLoader(sources, config, steps=8, seed=0, image_transform=to_pixels)
    seen = set(chain.from_iterable(batch.captions for batch in train))
    assert seen == {"A cat.", "One cat", "A dog.", ""}
    paired = LoaderConfig(batch_size=2, workers=0, captions_per_image=2)
    (batch,) = TrainLoader(sources[1:], paired, steps=1, seed=0, image_transform=to_pixels)
    assert batch.captions == ["", ""] and len(batch.text_ids_M) == 4


def test_command_line(put, tmp_path, monkeypatch, capsys):
    put(*FLAT_FILES)
    files = {"--questions": VQA, "--annotations": VQA_ANNOTATIONS}
    paths = {o: str(put(f"{o[2:]}.json", content=c)) for o, c in files.items()}
    common = ["--images", str(tmp_path / "images"), "--split", "val", "--out", str(tmp_path / "o")]
    command = ["data", "import", "vqav2", *chain.from_iterable(paths.items()), *common]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "2 samples, 0 captions, 3 questions, 1 shards in " in result.stdout
    expected = f'- {{name: shards, urls: "{tmp_path / "o"}", num_samples: 2}}'
    assert result.stdout.splitlines()[-1].strip() == expected
    monkeypatch.setattr("sys.argv", ["latentmodal", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out ")


def test_the_command_lists_every_reader():
    shown = CliRunner().invoke(cli.app, ["data", "import", "--help"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in READERS)
