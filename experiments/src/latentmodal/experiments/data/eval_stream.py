"""A finite, ordered pass over shards, dealt out to ranks and workers so that all do equal work.

Under FSDP every rank must run the same number of forward passes. With N samples and n consumers
(ranks x workers) each gives out exactly ceil(N / n); where one has fewer of its own, or skipped a
bad one, it repeats a sample. A repeat carries the index of the original: an evaluation that keeps
one result per index is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch.utils.data import IterableDataset

from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.decode import decode_sample
from latentmodal.experiments.data.faults import BadSampleError, BadSamples, Fault
from latentmodal.experiments.data.sample import RawSample, Sample
from latentmodal.experiments.data.stream import Consumer, ImageTransform, Source, this_consumer
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.errors import UserError


def count_keys(shards: Sequence[str]) -> int:
    """How many samples, usable or not, the shards hold; reads headers only where it can seek."""
    walk = _Walk(shards, lambda _index: False, lambda _fault: None, max_member_bytes=0)
    for _ in walk:
        raise AssertionError("no sample was wanted")
    return walk.count


class EvalStream(IterableDataset[Sample]):
    """The samples of ``sources``, one after the other, each with its number as ``index``."""

    def __init__(
        self,
        sources: Sequence[Source],
        image_transform: ImageTransform,
        config: LoaderConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._shards = [shard for source in sources for shard in source.shards]
        self._image_transform = image_transform
        self._config = config
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[Sample]:
        consumer = this_consumer(self._rank, self._world_size)
        faults: list[Fault] = []
        walk = self._walk(lambda index: index % consumer.total == consumer.place, faults.append)
        last: Sample | None = None
        given = 0
        for index, raw in walk:
            sample = self._decode(raw, index, faults)
            if sample is None:
                continue
            yield replace(sample, faults=(*faults, *sample.faults))
            faults.clear()
            last = replace(sample, faults=())
            given += 1
        # Every loss so far left a place to fill, so what is still in `faults` has a carrier.
        for _ in range(given, -(-walk.count // consumer.total)):
            last = last or self._any_sample(consumer)
            yield replace(last, faults=tuple(faults))
            faults.clear()

    def _walk(self, wanted: Callable[[int], bool], on_fault: Callable[[Fault], None]) -> _Walk:
        return _Walk(self._shards, wanted, on_fault, max_member_bytes=self._config.max_member_bytes)

    def _decode(self, raw: RawSample, index: int, faults: list[Fault]) -> Sample | None:
        try:
            return decode_sample(
                raw,
                self._image_transform,
                max_pixels=self._config.max_pixels,
                max_caption_chars=self._config.max_caption_chars,
                draft_side=self._config.draft_side,
                index=index,
            )
        except BadSampleError as error:
            faults.append(Fault(error.cause, raw.where))
            return None

    def _any_sample(self, consumer: Consumer) -> Sample:
        """The first usable sample of the whole set, for a consumer that has none of its own."""
        faults: list[Fault] = []
        for index, raw in self._walk(lambda _index: True, faults.append):
            sample = self._decode(raw, index, faults)
            if sample is not None:
                return replace(sample, faults=())
        tally = BadSamples()
        tally.add(0, faults)
        raise UserError(
            f"the {len(self._shards)} evaluation shards from {self._shards[0]} on hold no usable "
            f"sample: {tally.summary() or 'they are empty'}"
        )


class _Walk:
    """Iterates (number, raw sample) over shards in order; ``count`` is the total afterwards."""

    def __init__(
        self,
        shards: Sequence[str],
        wanted: Callable[[int], bool],
        on_fault: Callable[[Fault], None],
        *,
        max_member_bytes: int,
    ) -> None:
        self._shards = shards
        self._wanted = wanted
        self._on_fault = on_fault
        self._max_member_bytes = max_member_bytes
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, RawSample]]:
        self.count = 0
        for shard in self._shards:
            base = self.count
            try:
                stream = open_shard(shard)
            except OSError as error:
                raise UserError(f"shard {shard} cannot be read: {error}") from error
            with stream:
                samples = read_samples(
                    stream,
                    shard,
                    self._on_fault,
                    wanted=partial(self._asks, base),
                    max_member_bytes=self._max_member_bytes,
                )
                for raw in samples:
                    yield base + raw.ordinal, raw

    def _asks(self, base: int, ordinal: int) -> bool:
        # The reader asks about every key it meets, bad ones too.
        index = base + ordinal
        self.count = max(self.count, index + 1)
        return self._wanted(index)
