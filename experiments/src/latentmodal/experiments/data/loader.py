"""Loaders: an endless training stream cut into epochs of steps, and a finite evaluation pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from latentmodal.experiments.data.addresses import check_shards, expand_addresses
from latentmodal.experiments.data.collate import Batch, Collate, PromptTransform, TextTransform
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.decode import FeatureSource
from latentmodal.experiments.data.eval_stream import EvalStream, count_keys
from latentmodal.experiments.data.faults import BadSamples
from latentmodal.experiments.data.seeding import derive_seed
from latentmodal.experiments.data.stream import (
    Consumer,
    ImageTransform,
    ShardStream,
    Source,
    deals_samples,
)
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.orphans import end_with_parent

logger = logging.getLogger(__name__)


def open_sources(configs: Sequence[ShardSourceConfig]) -> list[Source]:
    """Expands and checks every address. Raises `UserError` naming the first bad one."""
    if not configs:
        raise UserError("no data source is given; name at least one set of shards")
    sources = []
    for config in configs:
        shards = expand_addresses(config.url_list)
        check_shards(shards)
        sources.append(Source(tuple(shards), config.weight, config.caption))
    return sources


def count_samples(configs: Sequence[ShardSourceConfig]) -> int:
    """How many samples the sources hold: as stated, or counted by reading the shards' headers."""
    return sum(
        config.num_samples or count_keys(expand_addresses(config.url_list)) for config in configs
    )


class TrainLoader:
    """``steps`` batches per epoch out of a stream that never ends, resumable after any of them.

    The workers live as long as the loader: a new epoch goes on where the last one stopped. It has a
    length, since Lightning fetches one batch ahead of a loader that has none, and would save a
    position that is one batch late.

    With ``features`` no picture is decoded: batches hold what is cached of them, and are otherwise
    the same ones in the same order.

    ``state_dict`` gathers the positions of all ranks (so every rank must call it together);
    ``load_state_dict`` picks its own. ``bad_samples`` counts what the batches given out cost.
    """

    def __init__(
        self,
        sources: Sequence[ShardSourceConfig],
        config: LoaderConfig,
        *,
        steps: int,
        seed: int,
        image_transform: ImageTransform,
        text_transform: TextTransform | None = None,
        prompt_transform: PromptTransform | None = None,
        features: FeatureSource | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1 batch per epoch")
        self.config = config
        self.steps = steps
        self.bad_samples = BadSamples()
        self._rank = _rank() if rank is None else rank
        self._world_size = _world_size() if world_size is None else world_size
        opened = open_sources(sources)
        self._layout = _layout(opened, config, seed, self._world_size)
        self._log_split(opened)
        stream = ShardStream(
            opened,
            image_transform,
            config,
            seed=seed,
            rank=self._rank,
            world_size=self._world_size,
            features=features,
        )
        self._loader: StatefulDataLoader[Any] = StatefulDataLoader(
            stream,
            batch_size=config.batch_size,
            num_workers=config.workers,
            collate_fn=Collate(
                text_transform, prompt_transform, config.match, config.captions_per_image
            ),
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            prefetch_factor=config.prefetch if config.workers else None,
            worker_init_fn=end_with_parent,
            # Its own generator: torch's loader draws a number whenever it starts.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[Batch] | None = None
        self._step = 0  # batches given out of the current epoch
        self._resumed = False  # until the first batch after `load_state_dict`

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; after `load_state_dict` in mid-epoch, what is left of that one."""
        return self._epoch(self._step % self.steps if self._resumed else 0)

    def _epoch(self, start: int) -> Iterator[Batch]:
        for step in range(start, self.steps):
            batch = self._next_batch()
            self._step, self._resumed = step + 1, False
            yield batch

    def _next_batch(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            batch = next(self._iterator)
            self.bad_samples.add(len(batch), batch.faults)
            self.bad_samples.check(self.config.max_bad_fraction)
            return batch
        except UserError as error:
            message = _last_line(error)
            # The traceback's frames would keep the workers alive after the loader is gone.
            error.__traceback__ = None
        self.close()
        raise UserError(message)

    def close(self) -> None:
        """Ends the workers now rather than when the loader is collected; its place is forgotten."""
        self._iterator = None
        self._loader.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out, on every rank. A collective operation."""
        mine = {"loader": self._loader.state_dict(), "bad_samples": self.bad_samples.state_dict()}
        return {"layout": self._layout, "step": self._step, "ranks": gather_objects(mine)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the batch after the one the state was saved at.

        Raises `UserError` where the stream would not be the same one: other shards, seed, batch
        size, shuffle window, or number of ranks or workers.
        """
        for name, now in self._layout.items():
            saved = state["layout"].get(name)
            if saved != now:
                raise UserError(
                    f"the checkpoint was written with {name}={saved}, this run has {name}={now}: "
                    f"its place in the data means nothing here; set {name} back to resume"
                )
        mine = state["ranks"][self._rank]
        self._iterator = None
        self._loader.load_state_dict(mine["loader"])
        self.bad_samples.load_state_dict(mine["bad_samples"])
        self._step, self._resumed = state["step"], True

    def _log_split(self, sources: Sequence[Source]) -> None:
        consumers = self._world_size * max(1, self.config.workers)
        for source in sources:
            if self._rank == 0 and deals_samples(source.shards, Consumer(0, consumers)):
                logger.info(
                    "%s: fewer shards (%d) than ranks x workers (%d), so each reads all of them "
                    "and keeps its own samples",
                    source.shards[0],
                    len(source.shards),
                    consumers,
                )


class EvalLoader:
    """One ordered pass per iteration; see `eval_stream` for how ranks share it.

    Each batch's ``index_B`` numbers its samples; padding repeats a number. The run stops with a
    `UserError` when more than ``max_bad_fraction`` of a pass was unusable.
    """

    def __init__(
        self,
        sources: Sequence[ShardSourceConfig],
        config: LoaderConfig,
        *,
        image_transform: ImageTransform,
        text_transform: TextTransform | None = None,
        prompt_transform: PromptTransform | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        self.config = config
        self.bad_samples = BadSamples()
        self._rank = _rank() if rank is None else rank
        self._world_size = _world_size() if world_size is None else world_size
        opened = open_sources(sources)
        self.num_samples = sum(count_keys(source.shards) for source in opened)
        stream = EvalStream(
            opened, image_transform, config, rank=self._rank, world_size=self._world_size
        )
        self._loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=config.batch_size,
            num_workers=config.workers,
            collate_fn=Collate(text_transform, prompt_transform, config.match),
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
            prefetch_factor=config.prefetch if config.workers else None,
            worker_init_fn=end_with_parent,
            persistent_workers=config.workers > 0,
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches per pass, the same on every rank."""
        workers = max(1, self.config.workers)
        per_worker = -(-self.num_samples // (self._world_size * workers))
        return workers * -(-per_worker // self.config.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.bad_samples = BadSamples()
        batches = iter(self._loader)
        for _ in range(len(self)):
            try:
                batch = next(batches)
            except UserError as error:
                raise UserError(_last_line(error)) from None
            self.bad_samples.add(len(batch), batch.faults)
            self.bad_samples.check(self.config.max_bad_fraction)
            yield batch
        self.bad_samples.check(self.config.max_bad_fraction, min_bad=1)


def gather_objects(mine: Any) -> list[Any]:
    """``mine`` of every rank, in order of rank; ``[mine]`` without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _last_line(error: UserError) -> str:
    """The message itself: a worker's exception arrives with its traceback in front."""
    return str(error).rstrip().rpartition(f"{UserError.__name__}: ")[2]


def _layout(
    sources: Sequence[Source], config: LoaderConfig, seed: int, world_size: int
) -> dict[str, Any]:
    """Everything a position in the stream depends on. Names, not folders: data may be moved."""
    named = [(source.weight, [PurePosixPath(s).name for s in source.shards]) for source in sources]
    return {
        "world_size": world_size,
        "workers": config.workers,
        "batch_size": config.batch_size,
        "seed": seed,
        "shuffle_window": config.shuffle_window,
        "sources": f"{derive_seed(repr(named)):016x}",
    }


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
