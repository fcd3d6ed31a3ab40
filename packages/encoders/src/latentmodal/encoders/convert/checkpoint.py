"""Dual-encoder checkpoints: read with their activation checked, write with it recorded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentmodal.encoders.activations import HF_ACTIVATIONS, Activation, activation_of
from latentmodal.encoders.convert.dual_encoders import (
    from_hf_clip,
    from_hf_siglip,
    from_open_clip,
)
from latentmodal.encoders.convert.files import find_weights, read_metadata, read_state_dict
from latentmodal.encoders.convert.rules import Converted, StateDict


class Activations(NamedTuple):
    """The MLP activation of each tower; None where a tower has none of the three known ones."""

    image: str | None
    text: str | None


def _ours(state: StateDict) -> Converted:
    prefixes = ("image_encoder.", "text_encoder.", "head.")
    return Converted(
        {key: tensor for key, tensor in state.items() if key.startswith(prefixes)},
        sorted(key for key in state if not key.startswith(prefixes)),
    )


FORMATS: dict[str, Callable[[StateDict], Converted]] = {
    "openai": from_open_clip,
    "open_clip": from_open_clip,
    "hf_clip": from_hf_clip,
    "hf_siglip": from_hf_siglip,
    "latentmodal": _ours,
}


def load_dual_encoder_weights(
    path: str | Path,
    format: str,
    *,
    activations: Activations,
    checkpoint_activations: Activations | None = None,
) -> dict[str, Tensor]:
    """Read a checkpoint into our names, refusing it if it was trained with another activation.

    Args:
        path: a weight file, or a folder as the hub lays it out.
        format: a key of `FORMATS`.
        activations: what the towers to be filled use (their `activation` attributes).
        checkpoint_activations: what the checkpoint was trained with, when the file does not say.
            OpenAI's files are QuickGELU; transformers and open_clip folders have it in their
            config, our own files in their header; a bare weight file has it nowhere.

    Returns:
        Tensors under `image_encoder.`, `text_encoder.` and `head.`.

    Raises:
        ValueError: unknown format, refused file, keys without a counterpart, activation unknown or
            different.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose from {', '.join(FORMATS)}.")
    trained_with = _recorded_activations(Path(path), format) or checkpoint_activations
    if trained_with is None:
        raise ValueError(
            f"{path} does not say which activation it was trained with; state "
            f"checkpoint_activations ({', '.join(get_args(Activation))}) for image and text."
        )
    for tower, ours, theirs in zip(("image", "text"), activations, trained_with, strict=True):
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"{path} was trained with activation={theirs!r} in its {tower} tower, ours has "
                f"{ours!r}; set the {tower} encoder's activation to {theirs!r}."
            )
    state, unmatched = FORMATS[format](read_state_dict(path))
    if unmatched:
        shown = ", ".join(unmatched[:5]) + (" ..." if len(unmatched) > 5 else "")
        raise ValueError(
            f"{path} has {len(unmatched)} keys that format={format!r} has no place for: {shown}."
        )
    return state


def save_dual_encoder_weights(
    path: str | Path, state: StateDict, *, activations: Activations
) -> None:
    """Write our state dict as safetensors, with the activations in its header."""
    metadata = {f"{k}_activation": v for k, v in activations._asdict().items() if v is not None}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "latentmodal", "format_version": "1", **metadata})


def _recorded_activations(path: Path, format: str) -> Activations | None:
    if format == "openai":
        return Activations("quick_gelu", "quick_gelu")
    if format == "latentmodal":
        metadata = read_metadata(path)
        if metadata.get("format") != "latentmodal":
            return None
        return Activations(metadata.get("image_activation"), metadata.get("text_activation"))
    folder = find_weights(path).parent
    if format == "open_clip":
        config = _read_json(folder / "open_clip_config.json")
        return None if config is None else _open_clip_activations(config["model_cfg"])
    config = _read_json(folder / "config.json")
    if config is None:
        return None
    default = "quick_gelu" if format == "hf_clip" else "gelu_pytorch_tanh"
    return Activations(
        _hf_activation(config.get("vision_config", {}), default),
        _hf_activation(config.get("text_config", {}), default),
    )


def _hf_activation(tower: dict[str, Any], default: str) -> Activation:
    name = tower.get("hidden_act", default)
    if name not in HF_ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r}: our towers know {', '.join(HF_ACTIVATIONS)} only.")
    return HF_ACTIVATIONS[name]


def _open_clip_activations(model: dict[str, Any]) -> Activations:
    vision, text = model["vision_cfg"], model["text_cfg"]
    base = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    image = (
        _timm_activation(vision["timm_model_name"])
        if "timm_model_name" in vision
        else (_with_approximation(base, vision))
    )
    return Activations(image, _with_approximation(base, text))


def _with_approximation(base: str, tower: dict[str, Any]) -> str:
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_tanh" if tanh else base


def _timm_activation(model: str) -> Activation | None:
    with torch.device("meta"):
        return activation_of(timm.create_model(model, num_classes=0))


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
