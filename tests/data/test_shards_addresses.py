"""Addresses: what they expand to, and what is refused before a run begins."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from latentmodal.experiments.data.addresses import check_shards, expand_addresses, open_shard
from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.data.loader import open_sources
from latentmodal.experiments.errors import UserError


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat /etc/passwd",
        "PIPE:cat x.tar",
        "pipe:curl http://host/{000..002}.tar",
        "cat x.tar |",
        "x$(id).tar",
        "`id`.tar",
        "simplecache::s3://bucket/a.tar",
        "reference://a.json",
        "git://repo:a.tar",
        "dask://a.tar",
        "gopher://host/a.tar",
        "data:text/plain;base64,AAAA",
    ],
)
def test_refused_addresses(address):
    with pytest.raises(UserError, match="address"):
        expand_addresses([address])


@pytest.mark.parametrize(
    "address",
    ["s3://b/a.tar", "gs://b/a.tar", "hf://datasets/o/n/a.tar", "https://h/a.tar?x=1&y=2"],
)
def test_known_stores_are_allowed(address):
    assert expand_addresses([address]) == [address]


def test_braces_wildcards_and_folders(make_shards):
    paths = [str(p) for p in make_shards(3, 1)]
    folder = str(Path(paths[0]).parent)
    assert expand_addresses([f"{folder}/{{00000..00002}}.tar"]) == paths
    assert expand_addresses([f"{folder}/*.tar"]) == paths
    assert expand_addresses([f"{folder}/0000?.tar"]) == paths
    assert expand_addresses([folder]) == paths
    assert expand_addresses([f"file://{folder}/*.tar"]) == paths
    assert expand_addresses(paths[::-1]) == paths[::-1]


def test_patterns_that_match_nothing_or_twice(make_shards, tmp_path):
    first = str(make_shards(1, 1)[0])
    with pytest.raises(UserError, match="no shard matches"):
        expand_addresses([str(tmp_path / "nothing" / "*.tar")])
    with pytest.raises(UserError, match="named twice"):
        expand_addresses([first, first])
    with pytest.raises(UserError, match="unbalanced"):
        expand_addresses(["a/{0..2.tar"])


def test_missing_empty_and_html_shards_are_named(make_shards, tmp_path):
    good = str(make_shards(1, 1)[0])
    for name, content, says in [
        ("gone.tar", None, "does not exist"),
        ("empty.tar", b"", "empty"),
        ("page.tar", b"<html>404</html>" * 100, "a web page"),
        ("short.tar", b"x" * 100, "not a tar"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}.*{says}"):
            check_shards([good, str(path)])


def test_remote_shards_through_fsspec(make_shards):
    local = make_shards(2, 2)
    store = fsspec.filesystem("memory")
    for path in local:
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    store.pipe("/bucket/empty.tar", b"")
    shards = expand_addresses(["memory://bucket/0*.tar"])
    assert shards == ["memory:///bucket/00000.tar", "memory:///bucket/00001.tar"]
    check_shards(shards)
    with open_shard(shards[0]) as stream:
        assert stream.read() == local[0].read_bytes()
    with pytest.raises(UserError, match=r"gone\.tar cannot be read"):
        check_shards([*shards, "memory://bucket/gone.tar"])
    with pytest.raises(UserError, match=r"empty\.tar is empty"):
        check_shards(["memory://bucket/empty.tar"])


def test_a_store_whose_package_is_missing_is_explained(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("latentmodal.experiments.data.addresses.url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://b/\*\.tar needs another package: Install s3fs"):
        expand_addresses(["s3://b/*.tar"])
    with pytest.raises(UserError, match=r"s3://b/a\.tar needs another package"):
        check_shards(["s3://b/a.tar"])


def test_no_source_at_all():
    with pytest.raises(UserError, match="no data source"):
        open_sources([])
    with pytest.raises(UserError, match="does not exist"):
        open_sources([ShardSourceConfig(urls="nowhere/{0..1}.tar")])
