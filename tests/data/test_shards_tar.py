"""Reading tars: nothing is paired wrongly, nothing is lost uncounted, nothing is executed."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.faults import Cause
from latentmodal.experiments.data.tar_reader import is_tar_header, read_samples, split_key
from latentmodal.experiments.errors import UserError


def _tar(members: list[tuple[str, bytes]], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _pairs(count: int, size: int = 700) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        members.append((f"{i:04d}.jpg", bytes([i]) * size))
        members.append((f"{i:04d}.txt", str(i).encode()))
    return members


class _Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False


def _read(data: bytes, *, stream=io.BytesIO, **options):
    faults = []
    samples = list(read_samples(stream(data), "a.tar", faults.append, **options))
    return samples, Counter(fault.cause for fault in faults)


@pytest.mark.parametrize("stream", [io.BytesIO, _Unseekable])
def test_whole_shard(stream):
    samples, faults = _read(_tar(_pairs(5)), stream=stream)
    assert [(s.key, s.ordinal, s.members["txt"]) for s in samples] == [
        (f"{i:04d}", i, str(i).encode()) for i in range(5)
    ]
    assert all(s.image == bytes([s.ordinal]) * 700 for s in samples)
    assert not faults


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(fmt):
    stem = "ordner/" + "ü" * 60 + "/" + "x" * 90 if fmt != tarfile.USTAR_FORMAT else "a" * 90
    samples, faults = _read(_tar([(f"{stem}.jpg", b"1"), (f"{stem}.TXT", b"2")], fmt))
    assert [(s.key, s.members) for s in samples] == [(stem, {"jpg": b"1", "txt": b"2"})]
    assert not faults


@pytest.mark.parametrize("stream", [io.BytesIO, _Unseekable])
def test_every_truncation_point_loses_only_the_tail_and_says_so(stream):
    whole = _tar(_pairs(4))
    end_of_data = 4 * (512 + 1024 + 512 + 512)
    points = sorted({*range(0, len(whole), 512), *range(1, end_of_data, 97), 513, 1535})
    for cut in points:
        samples, faults = _read(whole[:cut], stream=stream)
        for number, sample in enumerate(samples):
            assert sample.members == {"jpg": bytes([number]) * 700, "txt": str(number).encode()}
        if cut >= end_of_data + 512:  # the closing block is there
            assert (len(samples), faults) == (4, Counter())
        else:
            assert faults == {Cause.TRUNCATED_SHARD: 1}
            assert len(samples) == max(0, (cut - 512) // 2560)


def test_half_a_sample_never_meets_the_next_shard():
    """Keys restart in every shard: the image of one must not find the caption of another."""
    first = _tar(_pairs(3))
    cut = first[: 2 * 2560 + 512 + 1024]  # sample 2 has its image, not its caption
    second = _tar([("0002.txt", b"from the second shard"), ("0003.jpg", b"j"), ("0003.txt", b"3")])
    assert [s.ordinal for s in _read(cut)[0]] == [0, 1]
    alone = _read(second)[0][0]
    assert alone.members == {"txt": b"from the second shard"} and alone.image is None


@pytest.mark.parametrize("at", [0, 3 * 2560 + 100])
def test_a_damaged_header_is_counted(at):
    data = bytearray(_tar(_pairs(6)))
    data[at + 10] ^= 0xFF
    samples, faults = _read(bytes(data))
    assert len(samples) == max(0, at // 2560 - 1)
    assert faults == {Cause.CORRUPT_SHARD: 1}


def test_html_and_garbage_are_not_tars():
    page = b"<!doctype html>" + b" " * 2000
    assert not is_tar_header(page[:512])
    assert _read(page)[1] == {Cause.CORRUPT_SHARD: 1}
    assert _read(b"")[1] == {Cause.TRUNCATED_SHARD: 1}
    assert is_tar_header(_tar([])[:512]) and _read(_tar([])) == ([], Counter())


def test_duplicate_keys_are_dropped_and_counted():
    within = [("1.jpg", b"a"), ("1.jpg", b"b"), ("1.txt", b"c"), ("2.jpg", b"d"), ("2.txt", b"e")]
    samples, faults = _read(_tar(within))
    assert [s.key for s in samples] == ["2"] and faults == {Cause.DUPLICATE_KEY: 1}
    later = [*_pairs(2), ("0000.jpg", b"again"), ("0000.txt", b"again")]
    samples, faults = _read(_tar(later))
    assert [s.ordinal for s in samples] == [0, 1] and faults == {Cause.DUPLICATE_KEY: 1}


def test_oversized_members_are_skipped_unread():
    big = [("1.jpg", b"x" * 5000), ("1.txt", b"c"), *_pairs(1)]
    samples, faults = _read(_tar(big), max_member_bytes=4000)
    assert [s.key for s in samples] == ["0000"] and faults == {Cause.HUGE_MEMBER: 1}
    text = [("1.jpg", b"x"), ("1.txt", b" " * (1 << 21)), *_pairs(1)]
    assert _read(_tar(text))[1] == {Cause.HUGE_MEMBER: 1}


class _Bomb:
    def __reduce__(self):
        return (Path("/nonexistent/executed").touch, ())


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("stream", [io.BytesIO, _Unseekable])
@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "features.PKL", "npy"])
def test_pickled_members_are_refused_by_name(extension, stream):
    payload = pickle.dumps(_Bomb())
    if extension == "npy":
        payload = _npy(np.array([{}], dtype=object))
    data = _tar([*_pairs(1), (f"0007.{extension}", payload)])
    with pytest.raises(UserError, match=rf"a\.tar.*0007\.{extension}"):
        _read(data, stream=stream)


def test_plain_arrays_and_other_members_are_ignored():
    extra = [
        ("0000.npy", _npy(np.zeros(3))),
        ("0000.cls", b"1"),
        ("readme", b"hi"),
        ("._1.jpg", b""),
    ]
    samples, faults = _read(_tar([*_pairs(1), *extra]))
    assert [set(s.members) for s in samples] == [{"jpg", "txt"}] and not faults


def test_hostile_keys_are_only_labels():
    key = "../../../etc/passwd\x1b[31m"
    samples, _ = _read(_tar([(f"{key}.jpg", b"1"), (f"{key}.txt", b"2")]))
    assert samples[0].key == "../../../etc/passwd\x1b[31m"
    assert "\x1b" not in samples[0].where


def test_only_wanted_ordinals_are_read_and_reported():
    members = [*_pairs(6), ("0001.jpg", b"again")]  # a duplicate as ordinal 6
    evens, even_faults = _read(_tar(members), wanted=lambda i: i % 2 == 0)
    odds, odd_faults = _read(_tar(members), wanted=lambda i: i % 2 == 1)
    assert [s.ordinal for s in evens] == [0, 2, 4] and [s.ordinal for s in odds] == [1, 3, 5]
    assert even_faults == {Cause.DUPLICATE_KEY: 1} and not odd_faults


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_compressed_shards(tmp_path, keep):
    packed = gzip.compress(_tar(_pairs(5, size=5000)), mtime=0)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(packed[: int(len(packed) * keep)])
    faults = []
    with open_shard(str(path)) as stream:
        samples = list(read_samples(stream, "a.tar.gz", faults.append))
    if keep == 1.0:
        assert len(samples) == 5 and not faults
    else:
        assert len(samples) < 5 and [f.cause for f in faults] == [Cause.TRUNCATED_SHARD]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a/b.c/0001.JPG", ("a/b.c/0001", "jpg")),
        ("0001.left.jpg", ("0001", "left.jpg")),
        ("plain", ("plain", "")),
        (".hidden.jpg", ("", "hidden.jpg")),
    ],
)
def test_split_key(name, parts):
    assert split_key(name) == parts
