"""Written shards are the same bytes each time and can be read by webdataset."""

from __future__ import annotations

import pytest
import webdataset

from latentmodal.experiments.data.shard_writer import write_shards


def _samples(n):
    for i in range(n):
        yield {"__key__": f"{i:03d}", "txt": f"é {i}", "png": bytes([i]), "json": {"b": 1, "a": i}}


def test_bytes_do_not_depend_on_when_they_are_written(tmp_path):
    first = write_shards(_samples(5), tmp_path / "a", 2)
    second = write_shards(({**s} for s in _samples(5)), tmp_path / "b", 2)
    assert [p.name for p in first] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [p.name for p in first]


def test_webdataset_reads_them(tmp_path):
    shard = write_shards(_samples(2), tmp_path)[0]
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(s["__key__"], s["txt"].decode(), s["json"]) for s in read] == [
        ("000", "é 0", b'{"a": 0, "b": 1}'),
        ("001", "é 1", b'{"a": 1, "b": 1}'),
    ]


def test_bad_shard_size(tmp_path):
    with pytest.raises(ValueError, match="samples_per_shard=0"):
        write_shards([], tmp_path, 0)
