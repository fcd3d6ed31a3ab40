"""AdamW parameter groups and the warmup + cosine schedule, per optimiser step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from latentmodal.experiments.training.config import OptimConfig
from latentmodal.experiments.training.freeze import FreezePlan, plain_parameters
from latentmodal.experiments.training.layer_decay import layer_multipliers

# Embeddings and tokens that, like biases and norms, are offsets rather than maps: shrinking them
# towards zero regularises nothing. CLIP decays them in some code bases and not in others.
_NEVER_DECAYED = (
    "pos_embed",
    "positional_embedding",
    "position_embedding.weight",
    "position_embeddings.weight",
    "position_embeddings",
    "position_embed.weight",
    "input_positions",
    "cls_token",
    "reg_token",
    "register_tokens",
    "logit_scale",
    "logit_bias",
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and kernels do, vectors and scalars never."""
    return parameter.ndim > 1 and not name.endswith(_NEVER_DECAYED)


def parameter_groups(
    module: nn.Module, plan: FreezePlan, config: OptimConfig
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by (learning-rate multiplier, decayed or not).

    The multiplier is the freeze plan's times the layer decay's.

    Raises:
        ValueError: a layer-decay pattern fits nothing, see `layer_multipliers`.
    """
    layer_scale = layer_multipliers(module, config.layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in plain_parameters(module):
        if parameter.requires_grad:
            scale = plan.multiplier(name) * layer_scale.get(name, 1.0)
            groups.setdefault((scale, decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (scale, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over `groups`; the fused kernel where the device and dtype have one."""
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cuda", "cpu"}
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int
) -> LambdaLR:
    """Linear warmup to the peak, then a cosine to `min_lr` at `max_steps`.

    The warmup rises by equal steps from `warmup_start_lr` at step 0 to the peak at step
    `warmup_steps` (LAVIS' form, over the whole warmup), or without a start from lr / warmup_steps
    to the peak one step earlier.
    """
    floor = config.min_lr / config.lr
    start = None if config.warmup_start_lr is None else config.warmup_start_lr / config.lr

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            if start is None:
                return (step + 1) / config.warmup_steps
            return start + (1 - start) * step / config.warmup_steps
        span = max(1, max_steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / span)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
