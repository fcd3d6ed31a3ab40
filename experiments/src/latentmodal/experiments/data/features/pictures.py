"""Pictures of whole shards in their order, decoded by any number of processes.

Shapes: R rows (pictures x views, the views of one picture side by side), C channels, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from latentmodal.experiments.data.addresses import open_shard
from latentmodal.experiments.data.config import LoaderConfig
from latentmodal.experiments.data.decode import decode_image
from latentmodal.experiments.data.faults import BadSampleError
from latentmodal.experiments.data.sample import RawSample
from latentmodal.experiments.data.seeding import derive_seed, seeded
from latentmodal.experiments.data.stream import Consumer, this_consumer
from latentmodal.experiments.data.tar_reader import read_samples
from latentmodal.experiments.errors import UserError


class Part(NamedTuple):
    """A shard from sample ``first`` on."""

    address: str
    identity: str
    first: int


class Pictures(NamedTuple):
    """Some consecutive samples of part number ``part``; none of them may be usable."""

    part: int
    ordinals: list[int]
    pixels_RCHW: Tensor
    faults: dict[int, str]


class PictureStream(IterableDataset[Pictures]):
    """All pictures of ``parts``, ``config.batch_size`` samples at a time.

    Workers take turns: batch b of a shard is worker b mod n's, and where a shard ends early for
    some of them they give out empty batches. So the loader's own order is the shards'.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        transform: Callable[[Image.Image], Tensor],
        config: LoaderConfig,
        views: int,
    ) -> None:
        self._parts = tuple(parts)
        self._transform = transform
        self._config = config
        self._views = views

    def __iter__(self) -> Iterator[Pictures]:
        consumer = this_consumer(0, 1)
        for number in range(len(self._parts)):
            yield from self._read(number, consumer)

    def _read(self, number: int, consumer: Consumer) -> Iterator[Pictures]:
        part, size, last = self._parts[number], self._config.batch_size, -1
        batch, held = consumer.place, Pictures(number, [], torch.empty(0), {})
        pixels: list[Tensor] = []

        def wanted(ordinal: int) -> bool:
            nonlocal last
            last = max(last, ordinal)
            mine = (ordinal // size) % consumer.total == consumer.place
            return mine and ordinal >= part.first

        def finished() -> Pictures:
            nonlocal held, pixels, batch
            stacked = torch.stack(pixels) if pixels else torch.empty(0)
            done = held._replace(pixels_RCHW=stacked)
            held, pixels = Pictures(number, [], torch.empty(0), {}), []
            batch += consumer.total
            return done

        try:
            stream = open_shard(part.address)
        except OSError as error:
            raise UserError(f"shard {part.address} cannot be read: {error}") from error
        limit = self._config.max_member_bytes
        with stream:
            # What the tar itself has wrong is met, and counted, by training.
            samples = read_samples(
                stream, part.address, lambda _: None, wanted=wanted, max_member_bytes=limit
            )
            for raw in samples:
                while batch < raw.ordinal // size:
                    yield finished()
                if raw.image is None:
                    continue
                try:
                    pixels.extend(self._decode(raw, part.identity))
                    held.ordinals.append(raw.ordinal)
                except BadSampleError as error:
                    held.faults[raw.ordinal] = error.cause.value
        # At least one, so that an empty shard is heard of.
        rounds = max(1, -(-(last // size + 1) // consumer.total))
        while batch < rounds * consumer.total:
            yield finished()

    def _decode(self, raw: RawSample, identity: str) -> list[Tensor]:
        assert raw.image is not None
        config = self._config
        image = decode_image(raw.image, max_pixels=config.max_pixels, draft_side=config.draft_side)
        views = []
        for view in range(self._views):
            with seeded(derive_seed("features", identity, raw.ordinal, view)):
                views.append(self._transform(image))
        return views


def picture_loader(stream: PictureStream, workers: int) -> DataLoader[Pictures]:
    """``stream`` decoded in ``workers`` processes (0: in this one), in the same order."""
    return DataLoader(stream, batch_size=None, num_workers=workers)
