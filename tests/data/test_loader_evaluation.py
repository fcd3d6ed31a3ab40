"""Evaluation passes: ordered, complete, the same amount of work on every rank."""

from __future__ import annotations

import pytest

from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.faults import Cause
from latentmodal.experiments.data.loader import EvalLoader
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.errors import UserError


def _evaluation(urls, to_pixels, rank=0, world_size=1, **options) -> EvalLoader:
    config = LoaderConfig(**{"batch_size": 3, "workers": 0, **options})
    sources = [ShardSourceConfig(urls=str(url)) for url in urls]
    return EvalLoader(sources, config, image_transform=to_pixels, rank=rank, world_size=world_size)


def _index_and_caption(loader: EvalLoader) -> list[list[tuple[int, str]]]:
    return [list(zip(b.index_B.tolist(), b.captions, strict=True)) for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("shards", "per_shard"), [(3, 4), (1, 7), (1, 2)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_cover_everything_with_equal_batches(
    make_shards, to_pixels, workers, shards, per_shard, world_size
):
    paths = make_shards(shards, per_shard)
    expected = {s * per_shard + i: f"0 {s} {i}" for s in range(shards) for i in range(per_shard)}
    loaders = [
        _evaluation(paths, to_pixels, rank, world_size, workers=workers)
        for rank in range(world_size)
    ]
    parts = [_index_and_caption(loader) for loader in loaders]
    assert len({tuple(map(len, part)) for part in parts}) == 1, "ranks differ in batch sizes"
    assert [len(part) for part in parts] == [len(loader) for loader in loaders]
    rows = [row for part in parts for batch in part for row in batch]
    assert dict(rows) == expected and all(expected[index] == text for index, text in rows)
    if world_size == 1 and workers == 0:
        assert rows == sorted(expected.items())
    assert _index_and_caption(loaders[0]) == parts[0], "a second pass differs"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bad_samples_are_counted_and_replaced_by_repeats(
    tmp_path, encode_image, to_pixels, world_size
):
    image = encode_image((1, 2, 3))
    bad = {0, 1, 5}
    samples = [
        {"__key__": f"{i}", "png": b"" if i in bad else image, "txt": f"caption {i}"}
        for i in range(9)
    ]
    paths = write_shards(samples, tmp_path / "s", 4)
    parts, faults = [], []
    for rank in range(world_size):
        loader = _evaluation(paths, to_pixels, rank, world_size, max_bad_fraction=1.0)
        parts.append(_index_and_caption(loader))
        faults.append(loader.bad_samples.counts[Cause.ZERO_BYTE_IMAGE])
    assert len({tuple(map(len, part)) for part in parts}) == 1
    rows = {row for part in parts for batch in part for row in batch}
    assert rows == {(i, f"caption {i}") for i in range(9) if i not in bad}
    assert sum(faults) == len(bad)


def test_a_pass_with_too_many_bad_samples_is_an_error(tmp_path, encode_image, to_pixels):
    image = encode_image((1, 2, 3))
    samples = [{"__key__": f"{i}", "png": image, "txt": "" if i == 3 else "a"} for i in range(8)]
    paths = write_shards(samples, tmp_path / "s")
    with pytest.raises(UserError, match=r"1 of 9 .*1 x no caption \(.*00000\.tar :: 3\)"):
        list(_evaluation(paths, to_pixels))


def test_a_truncated_shard_does_not_shift_the_numbers(make_shards, to_pixels):
    paths = make_shards(2, 4)
    paths[0].write_bytes(paths[0].read_bytes()[: 3 * 2048 + 100])
    loader = _evaluation(paths, to_pixels, max_bad_fraction=1.0)
    rows = [row for batch in _index_and_caption(loader) for row in batch]
    assert dict(rows)[4] == "0 1 0" or dict(rows)[3] == "0 1 0"
    assert {text for _, text in rows} == {"0 0 0", "0 0 1", *(f"0 1 {i}" for i in range(4))}
    assert loader.bad_samples.counts == {Cause.TRUNCATED_SHARD: 1}


def test_empty_evaluation_set(tmp_path, to_pixels):
    paths = write_shards([{"__key__": "1", "png": b"x", "txt": "a"}], tmp_path)
    with pytest.raises(UserError, match="hold no usable sample: 1 x unsupported image format"):
        list(_evaluation(paths, to_pixels))
