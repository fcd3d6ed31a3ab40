"""What a cell costs per step: measured once on a few real batches, and kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.data.module import resolve_source
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.systems.frozen_prefix import frozen_prefix, run_prefix
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
_BATCHES = 8
"""Read for a measurement; tokens are counted in all of them."""
_WARM_UP = 2
_TIMED = 4


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """What a step of a cell takes; all of it over all ranks.

    Attributes:
        trainable_parameters, total_parameters: of the model.
        samples_per_step: the global batch size.
        tokens_per_step: mean of positions the language model reads, without padding; None where
            there is no such model.
        step_seconds: median time of a step on one device, its batch in memory.
        flops_per_step: matrix products and convolutions of forward and backward pass, two
            operations per multiply-add.
    """

    trainable_parameters: int
    total_parameters: int
    samples_per_step: int
    tokens_per_step: float | None
    step_seconds: float
    flops_per_step: int


@dataclass(frozen=True)
class CostFile:
    """`costs.json`: measurements by label, each valid for one recipe."""

    path: Path

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything in it; empty where there is no such file."""
        if not self.path.is_file():
            return {}
        try:
            payload = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path}: is no JSON ({error}); remove it") from error
        if payload.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{self.path}: is not of format {FORMAT_VERSION}; remove it")
        cells: dict[str, dict[str, Any]] = payload["cells"]
        return cells

    def costs(self, digests: Mapping[str, str]) -> dict[str, CellCost]:
        """Costs by label, of cells whose recipe is the one that was measured."""
        return {
            label: CellCost(**entry["cost"])
            for label, entry in self.read().items()
            if "cost" in entry and entry["recipe"] == digests.get(label)
        }

    def reasons(self) -> dict[str, str]:
        """By label, why a cell could not be measured, in one line."""
        return {label: entry["failed"] for label, entry in self.read().items() if "failed" in entry}

    def put(self, label: str, digest: str, result: CellCost | str) -> None:
        """Add a measurement, or the reason why there is none."""
        entry: dict[str, Any] = {"recipe": digest}
        if isinstance(result, CellCost):
            entry["cost"] = dataclasses.asdict(result)
        else:
            entry["failed"] = result
        payload = {"format_version": FORMAT_VERSION, "cells": {**self.read(), label: entry}}
        write_text_atomically(self.path, json.dumps(payload, indent=2) + "\n")


def measure(recipe: Recipe) -> CellCost:
    """Build the recipe's system and train a few steps of it; nothing is kept.

    It trains uncompiled, in one process, and on features where the recipe says so, which it makes
    from the pictures it read, without a cache.

    Raises:
        UserError: as `fit`: the data are unusable, the loss is not finite, …
    """
    single = dataclasses.replace(
        recipe.trainer,
        max_steps=_WARM_UP + _TIMED + 1,
        log_every=10**9,
        compile=False,
        devices=1,
        nodes=1,
        parallelism="single",
    )
    world_size = recipe.trainer.world_size
    recipe = dataclasses.replace(recipe, trainer=single)
    pl.seed_everything(recipe.seed, workers=True, verbose=False)
    with tempfile.TemporaryDirectory() as scratch:
        system = build_system(recipe, RunFolder(Path(scratch)))
    batches = _read_batches(recipe, system)
    meter = _StepMeter()
    trainer = pl.Trainer(
        max_steps=single.max_steps,
        accelerator=single.accelerator,
        devices=1,
        precision="bf16-mixed" if single.precision == "bf16" else "32-true",
        gradient_clip_val=recipe.optim.grad_clip,
        logger=False,
        callbacks=[meter],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        inference_mode=False,
    )
    trainer.fit(system, _Batches(batches))
    tokens = [system.count_tokens(batch) for batch in batches]
    counted = [int(count) for count in tokens if count is not None]
    sizes = [(p.numel(), p.requires_grad) for p in system.model.parameters()]
    return CellCost(
        trainable_parameters=sum(size for size, trains in sizes if trains),
        total_parameters=sum(size for size, _ in sizes),
        samples_per_step=recipe.data.loader.batch_size * world_size,
        tokens_per_step=statistics.fmean(counted) * world_size if counted else None,
        step_seconds=statistics.median(meter.seconds),
        flops_per_step=meter.flops * world_size,
    )


def _read_batches(recipe: Recipe, system: Any) -> list[Batch]:
    loader = TrainLoader(
        [resolve_source(source) for source in recipe.data.train],
        dataclasses.replace(recipe.data.loader, workers=0),
        steps=_BATCHES,
        seed=recipe.seed,
        image_transform=system.image_transform(recipe.data.augment),
        text_transform=system.text_transform,
        prompt_transform=system.prompt_transform,
        rank=0,
        world_size=1,
        pin_memory=False,
    )
    batches = list(loader)
    loader.close()
    if recipe.data.features is None:
        return batches
    stages = frozen_prefix(system.model)[:1]
    if not stages:
        raise UserError("data.features: the image tower trains; freeze it or leave features out")
    stages[0].eval()
    with torch.no_grad():
        return [
            dataclasses.replace(batch, features_BND=run_prefix(stages, batch.pixels_BCHW))
            for batch in batches
        ]


class _Batches:
    """Batches in memory, again and again."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return _WARM_UP + _TIMED + 1

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[step % len(self.batches)] for step in range(len(self)))


class _StepMeter(pl.Callback):
    """Times the steps after the first ones, and counts the operations of the last one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.flops = 0
        self._since = 0.0
        self._counts = False
        self._counter = FlopCounterMode(display=False)
        # Not every fused attention has a formula in every version; plain products do.
        self._plain_attention = sdpa_kernel(SDPBackend.MATH)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == _WARM_UP + _TIMED:
            self._plain_attention.__enter__()
            self._counter.__enter__()
            self._counts = True
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = time.perf_counter() - self._since
        if batch_idx == _WARM_UP + _TIMED:
            self._stop_counting()
            self.flops = self._counter.get_total_flops()
        elif batch_idx >= _WARM_UP:
            self.seconds.append(took)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop_counting()  # the next cell is measured in this process, too

    def _stop_counting(self) -> None:
        if self._counts:
            self._counter.__exit__(None, None, None)
            self._plain_attention.__exit__(None, None, None)
            self._counts = False
