"""The training half of a recipe: optimiser, schedule, trainer and parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

PARALLELISM = ("single", "ddp", "fsdp")
PRECISION = ("fp32", "bf16")


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{field} is '{value}'; choose from {', '.join(allowed)}")


def check_positive(**values: float | None) -> None:
    """Raise ValueError for the first named value that is given and not above zero."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warmup and a cosine to `min_lr`, both counted in optimiser steps.

    A part of the model with a multiplier (freeze plan, layer decay) follows the whole curve scaled.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup_steps: int = 0
    warmup_start_lr: float | None = None
    """Learning rate of the very first step; None starts at lr / warmup_steps."""
    min_lr: float = 0.0
    grad_clip: float | None = None
    """Largest global gradient norm; None leaves gradients as they are."""
    layer_decay: dict[str, float] = field(default_factory=dict)
    """Parameter-name pattern to decay: what it matches learns more slowly the deeper it lies."""

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps, grad_clip=self.grad_clip)
        if self.weight_decay < 0 or self.warmup_steps < 0 or self.min_lr < 0:
            raise ValueError("weight_decay, warmup_steps and min_lr must not be negative")
        if self.warmup_start_lr is not None and not 0 <= self.warmup_start_lr <= self.lr:
            raise ValueError(
                f"warmup_start_lr is {self.warmup_start_lr}; it must lie between 0 and lr {self.lr}"
            )
        for pattern, decay in self.layer_decay.items():
            if not 0 < decay <= 1:
                raise ValueError(
                    f"layer_decay: '{pattern}' is {decay}; give a number above 0, at most 1"
                )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, and how often things are written."""

    max_steps: int
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    parallelism: str = "single"
    """`single`, `ddp`, or `fsdp` (FSDP2, every rank a data-parallel shard)."""
    precision: str = "fp32"
    """`bf16` computes in bfloat16 over fp32 trainable parameters."""
    compile: bool = False
    activation_checkpointing: bool = False
    log_every: int = 20
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        check_choice("parallelism", self.parallelism, PARALLELISM)
        check_choice("precision", self.precision, PRECISION)
        check_choice("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        check_positive(
            max_steps=self.max_steps,
            devices=self.devices,
            nodes=self.nodes,
            log_every=self.log_every,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        if self.parallelism == "single" and self.devices * self.nodes > 1:
            raise ValueError(
                f"devices is {self.devices} on {self.nodes} node(s) but parallelism is 'single'; "
                "choose ddp or fsdp"
            )

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.devices * self.nodes
