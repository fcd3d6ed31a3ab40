"""What a training batch holds, and how a loader ends a run whose data is bad."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.faults import Cause
from latentmodal.experiments.data.loader import TrainLoader, count_samples
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError


class _Tokens(NamedTuple):
    ids_BT: Tensor
    mask_BT: Tensor


def _characters(texts: list[str]) -> _Tokens:
    ids_BT = torch.tensor([[ord(c) for c in text[:5].ljust(5)] for text in texts])
    return _Tokens(ids_BT, ids_BT != ord(" "))


def _train(urls, to_pixels, steps=3, **options) -> TrainLoader:
    config = LoaderConfig(**{"batch_size": 4, "workers": 0, "shuffle_window": 8, **options})
    return TrainLoader(
        [ShardSourceConfig(urls=[str(p) for p in urls])],
        config,
        steps=steps,
        seed=0,
        image_transform=to_pixels,
        text_transform=_characters,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_contents(make_shards, to_pixels, workers):
    loader = _train(make_shards(2, 8), to_pixels, steps=4, workers=workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    for batch in batches:
        assert len(batch) == 4
        assert batch.pixels_BCHW.shape == (4, 3, 2, 2) and batch.pixels_BCHW.dtype == torch.uint8
        assert torch.equal(batch.text.ids_BT, _characters(batch.captions).ids_BT)
        assert batch.text.mask_BT.dtype == torch.bool
        assert batch.all_captions == [[caption] for caption in batch.captions]
        assert batch.image_ids_B is None and batch.text_ids_M is None
        for caption, pixels_CHW in zip(batch.captions, batch.pixels_BCHW, strict=True):
            assert caption == " ".join(map(str, pixels_CHW[:, 0, 0].tolist()))
    seen = Counter(caption for batch in batches for caption in batch.captions)
    assert seen == {f"0 {s} {i}": 1 for s in range(2) for i in range(8)}
    assert loader.bad_samples.good == 16 and loader.bad_samples.bad == 0


def test_equal_captions_can_be_positives_of_one_another(tmp_path, encode_image, to_pixels):
    texts = ["a cat", "a dog", "a cat", "a  cat\n"]
    image = encode_image((1, 2, 3))
    paths = write_shards(
        ({"__key__": str(i), "png": image, "txt": text} for i, text in enumerate(texts)), tmp_path
    )
    batch = next(iter(_train(paths, to_pixels, match="caption")))
    same = batch.image_ids_B[:, None] == batch.text_ids_M[None, :]
    words = [caption.split()[1] for caption in batch.captions]
    assert same.tolist() == [[a == b for b in words] for a in words]
    assert same.sum() == 10


def test_texts_of_the_same_image_can_be_positives_of_one_another(to_pixels, encode_image, tmp_path):
    image = encode_image((1, 2, 3))
    named = ["coco/1", "vg/1", None, "coco/1"]  # equal numbers of two data sets are two images
    samples = (
        {
            "__key__": str(i),
            "png": image,
            "json": {"captions": ["a cat"]} | ({"image_id": name} if name else {}),
        }
        for i, name in enumerate(named)
    )
    paths = write_shards(samples, tmp_path)
    batch = next(iter(_train(paths, to_pixels, match="image")))
    same = batch.image_ids_B[:, None] == batch.text_ids_M[None, :]
    names = [named[int(key)] or key for key in batch.keys]
    assert same.tolist() == [[a == b for b in names] for a in names]
    assert same.sum() == 6 and batch.image_ids_B.dtype == torch.int64


def test_texts_of_the_same_fact_can_be_positives_however_worded(to_pixels, encode_image, tmp_path):
    image = encode_image((1, 2, 3))
    told = [  # the last two state no fact, so their captions stand for it
        ("a cat above a dog", "cat above dog"),
        ("a dog below a cat", "cat above dog"),
        ("a dog above a cat", "dog above cat"),
        ("a cat", None),
        ("a cat", None),
    ]
    samples = (
        {
            "__key__": str(i),
            "png": image,
            "json": {"captions": [text]} | ({"fact": fact} if fact else {}),
        }
        for i, (text, fact) in enumerate(told)
    )
    batch = next(
        iter(_train(write_shards(samples, tmp_path), to_pixels, batch_size=5, match="fact"))
    )
    same = batch.image_ids_B[:, None] == batch.text_ids_M[None, :]
    facts = [told[int(key)][1] or told[int(key)][0] for key in batch.keys]
    assert same.tolist() == [[a == b for b in facts] for a in facts]
    assert same.sum() == 4 + 1 + 4


def test_text_tokens_are_counted_without_padding(tmp_path, encode_image, to_pixels):
    texts = ["ab", "abc", "abcdefgh", "a"]
    image = encode_image((1, 2, 3))
    paths = write_shards(
        ({"__key__": str(i), "png": image, "txt": text} for i, text in enumerate(texts)), tmp_path
    )
    batch = next(iter(_train(paths, to_pixels)))
    assert batch.num_text_tokens == 2 + 3 + 5 + 1 == int(batch.text.mask_BT.sum())


@pytest.mark.parametrize(
    ("clean", "captions"),
    [("none", ["A Cat! (2)", "#Two\tdogs."]), ("blip", ["a cat 2", "two dogs"])],
)
def test_captions_are_cleaned_as_the_recipe_says(
    tmp_path, encode_image, to_pixels, clean, captions
):
    raw = {"captions": ["A Cat! (2)", "#Two\tdogs."]}
    sample = {"__key__": "1", "png": encode_image((1, 2, 3)), "json": raw}
    batch = next(iter(_train(write_shards([sample], tmp_path), to_pixels, clean=clean)))
    expected = [" ".join(caption.split()) for caption in captions]
    assert batch.all_captions == [expected] * 4
    assert set(batch.captions) <= set(expected)
    assert batch.meta[0] == raw, "the json is left alone"
    assert torch.equal(batch.text.ids_BT, _characters(batch.captions).ids_BT)


def test_batch_moves_as_a_whole(make_shards, to_pixels):
    batch = next(iter(_train(make_shards(1, 4), to_pixels, match="caption")))
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.keys == batch.keys
    tensors = (moved.pixels_BCHW, *moved.text, moved.index_B, moved.image_ids_B, moved.text_ids_M)
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_one_line(
    tmp_path, encode_image, to_pixels, workers
):
    image = encode_image((1, 2, 3))
    samples = (
        {"__key__": f"{i:04d}", "png": image[:45] if i % 5 == 0 else image, "txt": "a cat"}
        for i in range(50)
    )
    paths = write_shards(samples, tmp_path, 25)
    loader = _train(paths, to_pixels, steps=100, workers=workers, max_bad_fraction=0.15)
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert "corrupt image" in message and ".tar :: 00" in message and "max_bad_fraction" in message
    assert "\n" not in message
    assert loader.bad_samples.bad >= 20

    tolerant = _train(paths, to_pixels, steps=100, workers=workers, max_bad_fraction=0.3)
    assert len(list(tolerant)) == 100
    assert set(tolerant.bad_samples.counts) == {Cause.CORRUPT_IMAGE}
    assert 0.15 < tolerant.bad_samples.fraction < 0.25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_refusal_in_a_worker_arrives_as_one_line(make_shards, tmp_path, encode_image, workers):
    good = {"png": encode_image((1, 2, 3)), "txt": "a cat"}
    samples = [{"__key__": f"{i}", **good} for i in range(4)]
    paths = write_shards([*samples, {"__key__": "5", "pkl": b"cos\nsystem\n"}], tmp_path / "p", 5)
    loader = _train(paths, lambda image: torch.zeros(3, 1, 1, dtype=torch.uint8), workers=workers)
    with pytest.raises(UserError, match=r"^shard .*00000\.tar holds the pickled member '5\.pkl'"):
        list(loader)


def test_nothing_usable_in_a_worker_arrives_as_one_line(tmp_path, to_pixels):
    paths = write_shards([{"__key__": "1", "png": b"", "txt": "a"}], tmp_path)
    with pytest.raises(UserError, match=r"^source .*: 2 x zero-byte image \(.* :: 1\)$"):
        list(_train(paths, to_pixels, workers=1))


def test_ranks_and_workers_see_disjoint_parts(make_shards, to_pixels):
    paths = make_shards(8, 4)
    parts = []
    for rank in range(2):
        loader = TrainLoader(
            [ShardSourceConfig(urls=[str(p) for p in paths])],
            LoaderConfig(batch_size=4, workers=2, shuffle_window=3),
            steps=4,
            seed=0,
            image_transform=to_pixels,
            rank=rank,
            world_size=2,
        )
        parts.append([caption for batch in islice(loader, 4) for caption in batch.captions])
    assert sorted(parts[0] + parts[1]) == sorted(f"0 {s} {i}" for s in range(8) for i in range(4))


def test_counting_and_bad_arguments(make_shards, to_pixels):
    paths = make_shards(3, 5)
    source = ShardSourceConfig(urls=[str(p) for p in paths])
    stated = ShardSourceConfig(urls="s3://bucket/{0..9}.tar", num_samples=1000)
    assert count_samples([source]) == 15
    assert count_samples([source, stated]) == 1015
    with pytest.raises(ValueError, match="steps=0"):
        _train(paths, to_pixels, steps=0)


def test_several_captions_per_image_are_its_positives(to_pixels, encode_image, tmp_path):
    def sample(number: int, captions: list[str]) -> dict[str, object]:
        image = encode_image((number, 0, 0))
        return {"__key__": str(number), "png": image, "json": {"captions": captions}}

    texts = [["a0", "a1", "a2"], ["b0"], ["c0", "c1"], ["d0", "d1", "d2", "d3"]]
    write_shards((sample(i, t) for i, t in enumerate(texts)), tmp_path)
    loader = _train(sorted(tmp_path.glob("*.tar")), to_pixels, steps=1, captions_per_image=2)
    (batch,) = loader
    assert batch.image_ids_B is not None and batch.text_ids_M is not None
    assert len(set(batch.image_ids_B.tolist())) == 4
    assert batch.text_ids_M.tolist() == [i for i in batch.image_ids_B.tolist() for _ in range(2)]
    shown = ["".join(map(chr, row)).strip() for row in batch.text.ids_BT.tolist()]
    for image, captions in enumerate(batch.all_captions):
        own = shown[2 * image : 2 * image + 2]
        assert own[0] == batch.captions[image] and set(own) <= set(captions)
        assert len(set(own)) == min(2, len(captions))
