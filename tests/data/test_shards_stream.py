"""The stream: who reads what, in which order, how often, and what bad samples do to it."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.faults import BadSamples, Cause, Fault
from latentmodal.experiments.data.seeding import derive_seed, permutation, seeded
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.data.stream import (
    Consumer,
    MixIterator,
    ShardStream,
    Source,
    SourceStream,
)
from latentmodal.experiments.errors import UserError


def _stream(paths, *, place=0, total=1, seed=0, window=4, number=0) -> SourceStream:
    source = Source(tuple(str(p) for p in paths))
    config = LoaderConfig(shuffle_window=window)
    return SourceStream(source, number, pil_to_tensor, config, seed, Consumer(place, total))


def _epoch(stream: SourceStream, epoch: int) -> list[str]:
    """The captions of one epoch; the stream must stand at its start."""
    captions = []
    while True:
        before = stream.position
        sample = stream.next_sample()
        if stream.position.epoch != epoch:
            stream.restore(before)
            return captions
        t, s, i = map(int, sample.caption.split())
        assert sample.image[:, 0, 0].tolist() == [t, s, i], "an image met another's caption"
        captions.append(sample.caption)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 8])  # 5 shards: dealt out whole, then by sample
@pytest.mark.parametrize("window", [1, 4, 1000])
def test_each_epoch_is_dealt_out_once_and_wholly(make_shards, total, window):
    paths = make_shards(5, 16)
    everything = Counter(f"0 {s} {i}" for s in range(5) for i in range(16))
    streams = [_stream(paths, place=p, total=total, window=window) for p in range(total)]
    for epoch in range(2):
        parts = [_epoch(stream, epoch) for stream in streams]
        assert Counter(c for part in parts for c in part) == everything


def test_order_depends_on_seed_and_epoch_and_on_nothing_else(make_shards):
    paths = make_shards(4, 6)
    first, second = _stream(paths, seed=1), _stream(paths, seed=1)
    one, two = _epoch(first, 0), _epoch(first, 1)
    random.seed(99)
    torch.manual_seed(99)
    assert _epoch(second, 0) == one and _epoch(second, 1) == two
    other = _epoch(_stream(paths, seed=2), 0)
    assert len({tuple(one), tuple(two), tuple(other)}) == 3
    assert sorted(one) == sorted(two) == sorted(other)
    assert one != sorted(one)


def test_window_of_one_keeps_the_order_inside_a_shard(make_shards):
    captions = _epoch(_stream(make_shards(3, 5), window=1), 0)
    for start in range(0, 15, 5):
        assert [c.split()[2] for c in captions[start : start + 5]] == list("01234")


def test_resuming_anywhere_continues_exactly(make_shards):
    paths = make_shards(3, 7)
    unbroken = _stream(paths, window=5)
    positions, captions = [], []
    for _ in range(50):  # over two epochs
        positions.append(unbroken.position)
        captions.append(unbroken.next_sample().caption)
    for step, position in enumerate(positions):
        resumed = _stream(paths, window=5)
        resumed.restore(position)
        assert [resumed.next_sample().caption for _ in range(50 - step)] == captions[step:]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 1.8)])
def test_mixing_weights_are_honoured(make_shards, weights):
    streams = [_stream(make_shards(1, 8, source=t), number=t, window=8) for t in range(2)]
    mix = MixIterator(streams, weights, seed=3)
    n = 2000
    drawn = sum(sample.caption.startswith("0") for sample in islice(mix, n))
    share = weights[0] / sum(weights)
    assert abs(drawn - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_consumers_mix_independently(make_shards):
    sources = [Source((str(make_shards(1, 8, source=t)[0]),)) for t in range(2)]

    def draws(rank: int) -> str:
        config = LoaderConfig(shuffle_window=8)
        stream = ShardStream(sources, pil_to_tensor, config, seed=0, rank=rank, world_size=2)
        return "".join(sample.caption[0] for sample in islice(stream, 64))

    assert draws(0) != draws(1) and draws(0) == draws(0)


def _mixed_quality(tmp_path, encode_image, kinds: str, name: str = "mixed"):
    """One shard; per letter: g good, c corrupt, n no caption, z zero-byte."""
    good = encode_image((1, 2, 3))
    image = {"g": good, "c": good[:45], "n": good, "z": b""}
    samples = [
        {"__key__": f"{i:04d}", "png": image[kind], "txt": "" if kind == "n" else f"a {i}"}
        for i, kind in enumerate(kinds)
    ]
    return write_shards(samples, tmp_path / name, len(kinds))


def test_faults_are_counted_once_by_cause_even_when_resumed(tmp_path, encode_image):
    paths = _mixed_quality(tmp_path, encode_image, "gcgngzgggc" * 3)

    def total(resume_every: int | None) -> Counter:
        stream, counts = _stream(paths, window=4), Counter()
        for step in range(40):  # two epochs of 18 good samples, and some
            if resume_every and step % resume_every == 0:
                position = stream.position
                stream = _stream(paths, window=4)
                stream.restore(position)
            counts.update(fault.cause for fault in stream.next_sample().faults)
        return counts

    expected = total(None)
    assert set(expected) == {Cause.CORRUPT_IMAGE, Cause.NO_CAPTION, Cause.ZERO_BYTE_IMAGE}
    assert expected[Cause.CORRUPT_IMAGE] >= 12
    assert total(1) == expected and total(3) == expected


def test_truncated_shard_in_the_stream(make_shards):
    paths = make_shards(3, 4)
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[: 3 * 2048 + 700])
    for total in (1, 2, 4):  # whole shards, then single samples
        streams = [_stream(paths, place=p, total=total, window=3) for p in range(total)]
        counts: Counter = Counter()
        captions = []
        for stream in streams:
            for _ in range(200):
                sample = stream.next_sample()
                if stream.position.epoch > 0:
                    break
                captions.append(sample.caption)
                counts.update(fault.cause for fault in sample.faults)
            counts.update(f.cause for f in sample.faults)  # met while passing the end of the epoch
        missing = {"0 1 3"}
        assert set(captions) == {f"0 {s} {i}" for s in range(3) for i in range(4)} - missing
        assert counts[Cause.TRUNCATED_SHARD] >= 1 and set(counts) == {Cause.TRUNCATED_SHARD}


def test_a_shard_that_vanishes_is_counted(make_shards):
    paths = make_shards(2, 3)
    stream = _stream(paths)
    paths[1].unlink()
    faults = [fault for _ in range(6) for fault in stream.next_sample().faults]
    assert {fault.cause for fault in faults} == {Cause.UNREADABLE_SHARD}
    assert faults[0].where == str(paths[1])


@pytest.mark.parametrize("kinds", ["c" * 6, "n", "cnz"])
def test_nothing_usable_ends_with_the_causes(tmp_path, encode_image, kinds):
    stream = _stream(_mixed_quality(tmp_path, encode_image, kinds))
    with pytest.raises(UserError, match=r"no usable sample: .* x (corrupt image|no caption)"):
        stream.next_sample()


def test_fewer_samples_than_consumers_is_explained(make_shards):
    stream = _stream(make_shards(1, 2), place=4, total=5)
    with pytest.raises(UserError, match="no sample falls to consumer 4 of 5"):
        for _ in range(9):
            stream.next_sample()


def test_threshold_needs_a_share_and_a_number():
    tally = BadSamples()
    tally.add(1, [Fault(Cause.CORRUPT_IMAGE, f"a.tar :: {i}") for i in range(19)])
    tally.check(0.05)
    tally.add(0, [Fault(Cause.NO_CAPTION, "b.tar :: 7")])
    with pytest.raises(UserError, match=r"20 of 21 .*19 x corrupt image \(a.tar :: 0\), 1 x"):
        tally.check(0.05)
    tally.add(379, [Fault(Cause.CAPTION_CUT, "c.tar :: 1")] * 500)
    tally.check(0.05)
    assert (tally.bad, tally.fraction) == (20, 0.05)
    copy = BadSamples()
    copy.load_state_dict(tally.state_dict())
    assert copy.state_dict() == tally.state_dict()


def test_seeds_are_fixed_numbers():
    assert derive_seed(0, "shards", 1) == derive_seed("0", "shards", "1") == 3440014632038493849
    assert permutation(6, "x") == [2, 3, 0, 4, 1, 5]


def test_seeded_leaves_the_generators_as_they_were():
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    with seeded(7):
        inside = torch.rand(1).item(), random.random()
    assert (torch.rand(1), random.random()) == expected
    with seeded(7):
        assert (torch.rand(1).item(), random.random()) == inside
