"""What every export shares: its result, and the refusals of towers that have no counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from timm.models import VisionTransformer
from torch import Tensor, nn

from latentmodal.encoders import TextTransformer
from latentmodal.experiments.systems.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Export:
    """Weights under foreign names, and the JSON files that describe them, as text."""

    state: Mapping[str, Tensor]
    weights_name: str = "model.safetensors"
    configs: Mapping[str, str] = field(default_factory=dict)


def vit_and_text(model: DualEncoder, library: str) -> tuple[VisionTransformer, TextTransformer]:
    """Both towers, which must be the kinds that have a counterpart elsewhere."""
    trunk = getattr(model.image_encoder, "trunk", model.image_encoder)
    if not isinstance(trunk, VisionTransformer):
        raise ValueError(
            f"{library} has no place for a {type(trunk).__name__} as image_encoder; "
            "it takes timm's vision transformers"
        )
    if not isinstance(model.text_encoder, TextTransformer):
        raise ValueError(
            f"{library} has no place for a {type(model.text_encoder).__name__} as text_encoder; "
            "it takes the one named transformer"
        )
    return trunk, model.text_encoder


def require(library: str, fits: Mapping[str, bool]) -> None:
    """Refuse, by name, every property that does not fit."""
    if wrong := [what for what, fit in fits.items() if not fit]:
        raise ValueError(f"{library} has no place for {', '.join(wrong)}")


def shown(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def epsilon(norm: nn.Module) -> float:
    """The epsilon of a tower's LayerNorm; any other norm has no counterpart."""
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"image_encoder normalises by {type(norm).__name__}; LayerNorm is needed")
    return norm.eps
