"""What a run cost: parameters, samples, tokens, time and memory, kept over resumes."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_text_atomically

FORMAT_VERSION = 1
_KEPT_STEPS = 1000
"""The median is that of the newest so many steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCost:
    """The price of a trained run.

    Attributes:
        trainable_parameters, total_parameters: of the whole model, over all ranks.
        steps: optimiser steps that were measured; fewer than trained where a run was begun by a
            version that measured nothing.
        samples: pictures (or texts) seen, over all ranks.
        tokens: positions of the language model's sequences, soft tokens and text without padding,
            over all ranks (the first rank's times their number); None where there is no such model.
        train_seconds: time of these steps, waiting for data included, evaluation left out.
        step_seconds: the median step.
        peak_memory_bytes: most that was allocated on the accelerator; without one, the most that
            the process held.
    """

    trainable_parameters: int
    total_parameters: int
    steps: int
    samples: int
    tokens: int | None
    train_seconds: float
    step_seconds: float
    peak_memory_bytes: int

    def write(self, path: Path) -> None:
        """Write as JSON; a reader finds the old file or the new one."""
        payload = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_text_atomically(path, json.dumps(payload, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunCost:
        """Read what `write` wrote.

        Raises:
            UserError: the file is of another format.
        """
        payload = json.loads(path.read_text(encoding="utf-8"))
        if payload.pop("format_version", None) != FORMAT_VERSION:
            raise UserError(f"{path}: is not of format {FORMAT_VERSION}; train that run again")
        return cls(**payload)


class CostMeter(Callback):
    """Adds up what a run costs; the first of the callbacks.

    Its sums travel in the checkpoints, so a resumed run counts what it kept, and nothing twice.
    """

    def __init__(self) -> None:
        self.steps = self.samples = self.peak_memory = 0
        self.tokens: int | Tensor | None = 0
        self.seconds = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._since = self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` of the step to come, spent on something else than training."""
        self._paused += seconds

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._since, self._paused = time.perf_counter(), 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        took = now - self._since - self._paused
        self._since, self._paused = now, 0.0
        self.seconds += took
        self._step_seconds.append(took)
        self.steps += 1
        self.samples += len(batch) * trainer.world_size
        tokens = pl_module.count_tokens(batch)
        # A tensor stays on its device: reading it here would stall every step.
        self.tokens = None if tokens is None or self.tokens is None else self.tokens + tokens

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "samples": self.samples,
            "tokens": None if self.tokens is None else int(self.tokens),
            "seconds": self.seconds,
            "step_seconds": list(self._step_seconds),
            "peak_memory": max(self.peak_memory, peak_memory()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.samples = state_dict["steps"], state_dict["samples"]
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self.peak_memory = state_dict["peak_memory"]
        self._step_seconds.extend(state_dict["step_seconds"])

    def cost(self, trainer: Trainer, model: torch.nn.Module) -> RunCost:
        """The sums, once the last step is done."""
        tokens = None if self.tokens is None else int(self.tokens) * trainer.world_size
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        return RunCost(
            trainable_parameters=sum(size for size, trains in sizes if trains),
            total_parameters=sum(size for size, _ in sizes),
            steps=self.steps,
            samples=self.samples,
            tokens=tokens,
            train_seconds=self.seconds,
            step_seconds=statistics.median(self._step_seconds) if self._step_seconds else 0.0,
            peak_memory_bytes=max(self.peak_memory, peak_memory()),
        )


def peak_memory() -> int:
    """Bytes: the accelerator's peak where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
