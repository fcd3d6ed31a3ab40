"""Where a transformers model comes from: hub name, local folder, or an inline configuration."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

logger = logging.getLogger(__name__)


def check_source(model: str | None, config: dict[str, Any] | None) -> None:
    """Exactly one of `model` and `config` must be given.

    Raises:
        ValueError: neither or both are, or the inline config does not name its `model_type`.
    """
    if (model is None) == (config is None):
        raise ValueError("set exactly one of model (hub name or folder) and config (inline).")
    if config is not None and "model_type" not in config:
        raise ValueError("config has no model_type; add one, e.g. model_type: clip_vision_model.")


def hub_or_folder(model: str) -> str:
    """`~` of a local folder written out; a hub name as it is."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def resolve_config(model: str | None, config: dict[str, Any] | None, part: str) -> Any:
    """The transformers configuration of one tower.

    Args:
        model, config: as checked by `check_source`.
        part: "vision_config" or "text_config": which half to take of a dual-encoder configuration.
    """
    if config is not None:
        fields = {name: value for name, value in config.items() if name != "model_type"}
        full = AutoConfig.for_model(config["model_type"], **fields)
    else:
        assert model is not None, "see check_source"
        full = AutoConfig.from_pretrained(hub_or_folder(model))
    return getattr(full, part, full)


def build_model(
    model: str | None,
    config: Any,
    *,
    random_init: bool,
    without: tuple[str, ...] = (),
    bypass: tuple[str, ...] = (),
) -> Any:
    """The model, in float32: pretrained weights if `model` is named and `random_init` is off.

    Args:
        without: children to remove, such as a pooler nothing reads (DDP waits for the gradients of
            parameters that never get one).
        bypass: children that pass their input on instead, such as a final norm.
    """
    missing: list[str] = []
    if model is None or random_init:
        built: nn.Module = AutoModel.from_config(config, dtype=torch.float32)
    else:
        built, report = AutoModel.from_pretrained(
            hub_or_folder(model), config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        built.train()  # as from_config leaves it; the trainer decides what is frozen
    for child in without:
        if getattr(built, child, None) is not None:
            setattr(built, child, None)
    for child in bypass:
        built.set_submodule(child, nn.Identity(), strict=True)
    kept = {name for name, _ in built.named_parameters()}
    if absent := [name for name in missing if name in kept]:
        logger.warning("%s has no weights for %s: they start random", model, ", ".join(absent))
    return built


def set_grad_checkpointing(model: Any, enable: bool) -> None:
    """The non-reentrant form: the reentrant one fails under frozen inputs and FSDP2."""
    if enable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
