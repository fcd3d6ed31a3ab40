"""An endless, seeded stream of samples whose position is a handful of numbers.

Each *consumer* (one worker of one rank) owns a part of every epoch: the shards are permuted by
(seed, source, epoch) and dealt out, or, where there are fewer shards than consumers, every shard is
dealt out sample by sample. It reads its part in *windows* of undecoded samples, shuffles each
window by a generator named after the window's place, and decodes on the way out. So the position is
(epoch, shard, first sample of the window, samples taken from it): resuming reads one window again
and decodes nothing twice.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, NoReturn

from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.decode import FeatureSource, decode_sample, visit_seed
from latentmodal.experiments.data.faults import (
    BadSampleError,
    BadSamples,
    Cause,
    Fault,
)
from latentmodal.experiments.data.sample import RawSample, Sample
from latentmodal.experiments.data.seeding import derive_seed, derive_uniform, permutation
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.data.text_cleaning import clean_sample
from latentmodal.experiments.errors import UserError

logger = logging.getLogger(__name__)

ImageTransform = Callable[[Image.Image], Tensor]

_STARVED = 10_000
"""So many bad samples in a row end the stream: without a good one no batch reaches the loader."""


class Consumer(NamedTuple):
    """Which part is read here: number ``place`` of ``total`` (rank x workers + worker)."""

    place: int
    total: int


@dataclass(frozen=True)
class Source:
    """Shards that were checked, and how to draw from them."""

    shards: tuple[str, ...]
    weight: float = 1.0
    caption: str = "random"


@dataclass(frozen=True)
class Position:
    """Where in a source a consumer stands: the start of its window and how much of it is used."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    taken: int = 0


def shards_of_epoch(
    shards: Sequence[str], seed: int, source: int, epoch: int, consumer: Consumer
) -> list[str]:
    """This consumer's shards of one epoch, in order; all of them when samples are dealt out."""
    order = [shards[i] for i in permutation(len(shards), seed, "shards", source, epoch)]
    return order if deals_samples(shards, consumer) else order[consumer.place :: consumer.total]


def deals_samples(shards: Sequence[str], consumer: Consumer) -> bool:
    """Whether there are too few shards to give each consumer one of its own."""
    return len(shards) < consumer.total


class SourceStream:
    """The endless samples of one source for one consumer."""

    def __init__(
        self,
        source: Source,
        number: int,
        image_transform: ImageTransform,
        config: LoaderConfig,
        seed: int,
        consumer: Consumer,
        features: FeatureSource | None = None,
    ) -> None:
        self._source = source
        self._number = number
        self._image_transform = image_transform
        self._config = config
        self._seed = seed
        self._consumer = consumer
        self._features = features
        self._losses = BadSamples()  # only to tell the user why nothing comes
        self.restore(Position())

    def restore(self, position: Position) -> None:
        """Goes to ``position``; its window is read when the next sample is asked for."""
        self.position = position
        self._following = position  # where the next window starts
        self._window: list[RawSample] | None = None  # what is left of it, last first
        self._reader: Iterator[tuple[int, RawSample]] | None = None
        self._faults: list[Fault] = []

    def next_sample(self) -> Sample:
        """The next usable sample, carrying the faults met on the way to it.

        Raises `UserError` when a whole pass over this consumer's part has nothing usable.
        """
        first_epoch, first_bad = self.position.epoch, self._losses.bad
        while True:
            raw = self._next_raw(first_epoch)
            visit = visit_seed(self._seed, self._number, self.position.epoch, raw)
            try:
                sample = decode_sample(
                    raw,
                    self._image_transform,
                    max_pixels=self._config.max_pixels,
                    max_caption_chars=self._config.max_caption_chars,
                    draft_side=self._config.draft_side,
                    caption=self._source.caption,
                    seed=visit,
                    features=self._features,
                )
            except BadSampleError as error:
                self._record(Fault(error.cause, raw.where))
                if self._losses.bad - first_bad >= _STARVED:
                    self._give_up(f"{_STARVED} samples in a row are unusable")
                continue
            faults, self._faults = (*self._faults, *sample.faults), []
            if self._config.clean == "blip":
                sample = clean_sample(sample)
            return replace(sample, faults=faults, draw=derive_seed(visit, "draw"))

    def _next_raw(self, first_epoch: int) -> RawSample:
        while True:
            if self._window is None:
                self._window = self._read_window()
            if self._window:
                self.position = replace(self.position, taken=self.position.taken + 1)
                return self._window.pop()
            # Two epochs on, one was passed from end to end.
            if self._following.epoch > first_epoch + 1:
                self._give_up("a whole pass found no usable sample")
            self.position, self._window = self._following, None

    def _read_window(self) -> list[RawSample]:
        """Reads the window at `position`, shuffled, last first, without what was already taken."""
        start = self.position
        if self._reader is None:
            self._reader = self._read_epoch(start)
        held = list(itertools.islice(self._reader, self._config.shuffle_window))
        if len(held) == self._config.shuffle_window:
            shard, last = held[-1]
            self._following = Position(start.epoch, shard, last.ordinal + 1)
        else:
            self._following, self._reader = Position(start.epoch + 1), None
        if start.taken > 0:
            self._faults.clear()  # counted when the window was first read
        place = (self._number, start.epoch, *self._consumer, start.shard, start.sample)
        order = permutation(len(held), self._seed, "window", *place)
        return [held[i][1] for i in order[start.taken :]][::-1]

    def _read_epoch(self, start: Position) -> Iterator[tuple[int, RawSample]]:
        shards = shards_of_epoch(
            self._source.shards, self._seed, self._number, start.epoch, self._consumer
        )
        for number in range(start.shard, len(shards)):
            first = start.sample if number == start.shard else 0
            for raw in self._read_shard(shards[number], start.epoch, first):
                yield number, raw

    def _read_shard(self, shard: str, epoch: int, first: int) -> Iterator[RawSample]:
        parts = self._consumer.total if deals_samples(self._source.shards, self._consumer) else 1

        def mine(ordinal: int) -> bool:
            # Turning with the epoch, so that a consumer does not meet the same samples for ever.
            return (ordinal + epoch) % parts == self._consumer.place % parts

        try:
            stream = open_shard(shard)
        except OSError as error:
            logger.warning("%s: %s: %s", Cause.UNREADABLE_SHARD, shard, error)
            if mine(0):
                self._record(Fault(Cause.UNREADABLE_SHARD, shard))
            return
        with stream:
            yield from read_samples(
                stream,
                shard,
                self._record,
                wanted=lambda ordinal: ordinal >= first and mine(ordinal),
                max_member_bytes=self._config.max_member_bytes,
                images=self._features is None,
            )

    def _record(self, fault: Fault) -> None:
        self._faults.append(fault)
        self._losses.add(0, [fault])

    def _give_up(self, what: str) -> NoReturn:
        shards = self._source.shards
        name = shards[0] if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more"
        why = self._losses.summary() or (
            f"no sample falls to consumer {self._consumer.place} of {self._consumer.total} "
            "(ranks x workers); lower workers"
        )
        raise UserError(f"source {name}: {what}: {why}")


class MixIterator(Iterator[Sample]):
    """Draws each sample's source by weight, from a generator named after the sample's number."""

    def __init__(
        self, streams: Sequence[SourceStream], weights: Sequence[float], seed: int
    ) -> None:
        self._streams = streams
        self._edges = list(itertools.accumulate(w / sum(weights) for w in weights))
        self._seed = seed
        self._yielded = 0

    def __next__(self) -> Sample:
        sample = self._streams[self._draw()].next_sample()
        self._yielded += 1
        return sample

    def _draw(self) -> int:
        if len(self._streams) == 1:
            return 0
        point = derive_uniform(self._seed, "source", self._yielded)
        return min(bisect.bisect_right(self._edges, point), len(self._streams) - 1)

    def state_dict(self) -> dict[str, Any]:
        """A few numbers per source."""
        return {
            "yielded": self._yielded,
            "positions": [asdict(stream.position) for stream in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the sample after the last one given out before `state_dict`."""
        assert len(state["positions"]) == len(self._streams)
        self._yielded = state["yielded"]
        for stream, position in zip(self._streams, state["positions"], strict=True):
            stream.restore(Position(**position))


class ShardStream(IterableDataset[Sample]):
    """The mixed, endless stream; each iterator serves the consumer of the worker it is made in."""

    def __init__(
        self,
        sources: Sequence[Source],
        image_transform: ImageTransform,
        config: LoaderConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        features: FeatureSource | None = None,
    ) -> None:
        self._sources = tuple(sources)
        self._image_transform = image_transform
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._features = features

    def __iter__(self) -> MixIterator:
        consumer = this_consumer(self._rank, self._world_size)
        streams = [
            SourceStream(
                source,
                i,
                self._image_transform,
                self._config,
                self._seed,
                consumer,
                self._features,
            )
            for i, source in enumerate(self._sources)
        ]
        mix_seed = derive_seed(self._seed, "mix", *consumer)
        return MixIterator(streams, [source.weight for source in self._sources], mix_seed)


def this_consumer(rank: int, world_size: int) -> Consumer:
    """The consumer of the calling loader worker (or of the process itself) on ``rank``."""
    info = get_worker_info()
    workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
    return Consumer(rank * workers + worker, world_size * workers)
