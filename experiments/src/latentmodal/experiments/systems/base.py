"""What every system shares: the freeze plan, the optimiser, parallelism and checkpoint hygiene."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from latentmodal.bridges.distributed import sum_over_ranks, world_size
from latentmodal.encoders import ImageEncoder, Tokenizer
from latentmodal.experiments.data.augment import AugmentConfig
from latentmodal.experiments.data.collate import Batch, PromptTransform
from latentmodal.experiments.data.text_cleaning import clean_caption
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.fingerprints import fingerprint, tower_digests
from latentmodal.experiments.training.freeze import (
    FreezePlan,
    freeze_pooling,
    keep_frozen_in_eval,
)
from latentmodal.experiments.training.optim import build_adamw, parameter_groups, warmup_cosine
from latentmodal.experiments.training.strategies import wrap_model


class System(LightningModule):
    """A model, an objective (`training_step`, in the subclass) and what is frozen.

    The model is a plain single-device module that declares what `wrap_model` needs: `fsdp_units`,
    `fp32_modules`, and `fsdp_forward_methods` (methods besides `forward` that read parameters).
    """

    strict_loading = False  # frozen weights are not in the checkpoint; the strategy checks the rest

    reads_pooled: ClassVar[bool] = True
    """Whether the objective reads the image tower's pooled feature; otherwise its tokens alone."""

    seed: int = 0
    """The recipe's, for what the objective draws."""
    clean: str = "none"
    """As `LoaderConfig.clean`: texts to evaluate on are read as those of training were."""

    def __init__(
        self, model: nn.Module, plan: FreezePlan, optim: OptimConfig, trainer_config: TrainerConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.optim = optim
        self.trainer_config = trainer_config
        plan.apply(model)
        if not self.reads_pooled:
            tower = model.image_encoder
            assert isinstance(tower, ImageEncoder)
            freeze_pooling(tower)
        self.frozen_fingerprint = fingerprint(model)
        self.frozen_tower = tower_digests(model)
        self.shown: dict[str, float] = {}  # what the progress bar shows: plain numbers, read once
        self._wrapped = self._sharded = False
        self.tokenizer: Tokenizer | None = None

    def image_transform(self, augment: AugmentConfig) -> Callable[[Any], Tensor]:
        """How training pictures become pixels."""
        encoder = self.model.image_encoder
        assert isinstance(encoder, ImageEncoder)
        return encoder.preprocess.train(augment.scale, flip=augment.flip)

    @property
    def text_transform(self) -> Tokenizer | None:
        """What makes tokens of captions in the loader, where the system reads them."""
        return self.tokenizer

    @property
    def prompt_transform(self) -> PromptTransform | None:
        """What writes a language model's prompts in the loader, where the system has one."""
        return None

    def count_tokens(self, batch: Batch) -> Tensor | None:
        """Positions the language model reads of a batch, padding aside; None without such a model.

        On the batch's device, so that nothing waits for it.
        """
        return None if batch.prompts is None else batch.prompts.count_tokens()

    def read_as_in_training(self, captions: list[str]) -> list[str]:
        """Captions as the loader would have cleaned them."""
        return [clean_caption(text) for text in captions] if self.clean == "blip" else captions

    def finish(self, folder: Path) -> None:
        """Leave what others will read in the run's folder; every rank calls it after the end."""

    def configure_model(self) -> None:
        """Apply compilation and parallelism once (Lightning calls this at every stage)."""
        if self._wrapped:
            return
        self._wrapped = True
        sharded = self.trainer_config.parallelism == "fsdp"
        mesh = self.device_mesh["data_parallel"] if sharded and self.device_mesh else None
        self._sharded = mesh is not None
        wrap_model(self.model, self.trainer_config, mesh)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self.model, self.plan, self.optim)
        optimizer = build_adamw(groups, self.optim)
        schedule = warmup_cosine(optimizer, self.optim, self.trainer_config.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the global norm.

        Lightning refuses to under bf16 with a fused optimiser, for the sake of a gradient scaler
        that bf16 does not have.
        """
        if gradient_clip_val:
            parameters = [p for p in self.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def cached_features(self, batch: Batch) -> Tensor | None:
        """The batch's cached features, in the dtype that the frozen modules hand on; or None."""
        if batch.features_BND is None:
            return None
        fast = self.trainer_config.precision == "bf16" and self._sharded
        return batch.features_BND.to(torch.bfloat16 if fast else torch.float32)

    def compute_precision(self) -> torch.autocast:
        """The recipe's precision outside the training step; a sharded model has its own."""
        fast = self.trainer_config.precision == "bf16" and not self._sharded
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def train(self, mode: bool = True) -> System:
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self.model)
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["frozen_fingerprint"] = self.frozen_fingerprint
        checkpoint["frozen_tower"] = self.frozen_tower

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("frozen_fingerprint") != self.frozen_fingerprint:
            raise UserError(
                "the frozen weights are not the ones this checkpoint was trained on; "
                "resume with the recipe, seed and weight files it began with"
            )

    @property
    def should_log(self) -> bool:
        """Whether this step's scalars are written (reading them costs a device synchronisation).

        The last step's always are: a curve ends where the training did, and a trial of five steps
        shows its loss.
        """
        step, config = self.global_step + 1, self.trainer_config
        return step % config.log_every == 0 or step == config.max_steps

    def record(self, loss: Tensor, **values: Tensor) -> None:
        """Write this step's scalars at once, the loss as its mean over ranks.

        `self.log` would hold them until after the checkpoint hook: a run killed there would resume
        past a step whose point in the curve was never written.
        """
        mean = self.mean_over_ranks(loss)
        scalars: dict[str, Any] = {"loss": mean, "lr": self._peak_lr(), **values}
        metrics = {f"train/{name}": float(value) for name, value in scalars.items()}
        self.shown["loss"] = metrics["train/loss"]
        if self.logger is not None:
            self.logger.log_metrics(metrics, step=self.global_step + 1)  # of completed steps

    def mean_over_ranks(self, value: Tensor) -> Tensor:
        """For the record; every rank calls it."""
        # A copy, because the reduction writes into what it is given.
        mean: Tensor = self.trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
        return mean

    def _peak_lr(self) -> float:
        return max(group["lr"] for group in self.trainer.optimizers[0].param_groups)

    def check_finite(self, loss: Tensor, keys: list[str]) -> None:
        """Stop before a broken loss reaches the weights; on GPUs looked at on logging steps only.

        Raises:
            UserError: the loss is NaN or infinite; names the step and the batch.
        """
        if (loss.device.type == "cpu" or self.should_log) and not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step} "
                f"(samples {', '.join(keys[:4])}, …); lower optim.lr, set optim.grad_clip, "
                "then resume=true from the checkpoint before"
            )


def shared_count(count: int, device: torch.device) -> Tensor:
    """What to divide a local sum by, so that its mean over ranks is that over all ranks' tokens."""
    counted = torch.full((), float(count), device=device)  # no copy, so no waiting
    return sum_over_ranks(counted).clamp(min=1) / world_size()
