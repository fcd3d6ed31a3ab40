"""What happens beside the training step: checkpoints, evaluation, throughput, skipped samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.training.checkpoints import SUFFIX, digest_path, step_of

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Saves every `every` steps, at the last step and on SIGTERM; keeps the newest `keep`.

    It saves from within the batch hook: after `fit` returns, the loader has forgotten its place.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self._saved_step = -1

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self._save(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SIGTERMException):  # raised between batches, so the state is whole
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for logger in trainer.loggers:  # what the checkpoint is past must survive a kill, too
                assert isinstance(logger, TensorBoardLogger)
                logger.experiment.flush()
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step:08d}{SUFFIX}")
        if trainer.is_global_zero:
            self._prune()

    def _prune(self) -> None:
        kept = sorted(self.folder.glob(f"*{SUFFIX}"), key=step_of, reverse=True)
        for path in kept[self.keep :]:
            path.unlink(missing_ok=True)
            digest_path(path).unlink(missing_ok=True)


class Evaluate(Callback):
    """Runs `evaluate(step)` every `every` steps, in eval mode, leaving no trace in training.

    With `at_start` also before the first step: what an untrained bridge does.
    """

    def __init__(self, evaluate: Callable[[int], None], every: int, at_start: bool = False) -> None:
        self.evaluate, self.every, self.at_start = evaluate, every, at_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_start and trainer.global_step == 0:
            self._run(pl_module, 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every or step == trainer.max_steps:  # the last step is evaluated after fit
            return
        self._run(pl_module, step)

    def _run(self, pl_module: LightningModule, step: int) -> None:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            pl_module.eval()
            self.evaluate(step)
            pl_module.train()


class Progress(RichProgressBar):
    """A bar fed with numbers already on the host: reading a tensor would stall every step."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        return {name: f"{value:.4g}" for name, value in pl_module.shown.items()}


class PlainProgress(Callback):
    """A line now and then, where the output is a file and a progress bar would be noise."""

    def __init__(self, lines: int = 20) -> None:
        self.lines = lines

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        step, last = trainer.global_step, trainer.max_steps
        if (
            trainer.is_global_zero
            and (step * self.lines) // last > ((step - 1) * self.lines) // last
        ):
            shown = "  ".join(f"{name} {value:.4g}" for name, value in pl_module.shown.items())
            log.info("step %d/%d  %s", step, last, shown)


class Throughput(Callback):
    """Logs samples/s over all ranks, waiting for data as a share of time, and skipped samples."""

    def __init__(self, loader: TrainLoader, every: int) -> None:
        self.loader, self.every = loader, every
        self._samples, self._since, self._waited, self._idle = 0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._idle = time.perf_counter()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._waited += time.perf_counter() - self._idle

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._samples += len(batch) * trainer.world_size
        if trainer.global_step % self.every == 0:
            seconds = time.perf_counter() - self._since
            bad_samples = self.loader.bad_samples
            speed = self._samples / seconds
            pl_module.shown["samples/s"] = speed
            scalars = {
                "speed/samples_per_s": speed,
                "speed/data_wait_share": self._waited / seconds,
                "data/skipped": float(bad_samples.bad),
            }
            for cause, count in bad_samples.counts.items():
                scalars[f"data/by_cause/{cause.replace(' ', '_')}"] = float(count)
            if trainer.logger is not None:
                trainer.logger.log_metrics(scalars, step=trainer.global_step)
            self._samples, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._idle = time.perf_counter()
