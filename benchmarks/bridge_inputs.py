"""What the benchmarks of Q-Formers feed both sides, and how their weights and gradients meet.

The frozen image encoder costs every side the same and is left out: its features are the input.

Legend: B pairs, N feature tokens, F width of the features, T text length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentmodal.encoders import Features, ImageEncoder

SHORTEST, AVERAGE, LONGEST = 8, 12, 20  # tokens of a caption, special ones included


@dataclass(frozen=True, kw_only=True)
class QFormerShape:
    """How large the Q-Former and its inputs are."""

    layers: int
    width: int
    heads: int
    mlp_dim: int
    vocab_size: int
    embed_dim: int
    num_queries: int
    in_dim: int
    num_features: int
    text_length: int
    """What LAVIS pads captions to."""


PUBLISHED = QFormerShape(
    layers=12, width=768, heads=12, mlp_dim=3072, vocab_size=30523, embed_dim=256, num_queries=32,
    in_dim=1408, num_features=257, text_length=32,
)  # fmt: skip
REDUCED = QFormerShape(
    layers=6, width=384, heads=6, mlp_dim=1536, vocab_size=30523, embed_dim=256, num_queries=32,
    in_dim=1408, num_features=257, text_length=32,
)  # fmt: skip
TINY = QFormerShape(
    layers=3, width=32, heads=2, mlp_dim=48, vocab_size=80, embed_dim=16, num_queries=4,
    in_dim=24, num_features=10, text_length=32,
)  # fmt: skip


class GivenFeatures(nn.Module):
    """Stands for a frozen encoder: its pictures are features already."""

    def forward(self, features_BNF: Tensor) -> Features:
        return Features(features_BNF, features_BNF[:, 0])


def given_features() -> ImageEncoder:
    """A `GivenFeatures` in an encoder's place; nothing else of one is asked for in a step."""
    return cast(ImageEncoder, GivenFeatures())


def draw_features(shape: QFormerShape, batch: int) -> Tensor:
    """Random features (B, N, F)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, shape.num_features, shape.in_dim, generator=generator)


def caption_lengths(batch: int) -> Tensor:
    """About the lengths of captions, in tokens: most of them short, a few long."""
    spread = 0.25
    logs = torch.randn(batch, generator=torch.Generator().manual_seed(1)) * spread
    lengths = (logs + math.log(AVERAGE)).exp().round().long()
    return lengths.clamp(SHORTEST, LONGEST)


def write_parameters(model: nn.Module, path: str) -> None:
    """Keep every parameter once, however many names it has."""
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, path)


@torch.no_grad()
def read_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state`, which must name all parameters of `model` and nothing else, into it."""
    own = dict(model.named_parameters())
    assert own.keys() == state.keys(), sorted(own.keys() ^ state.keys())[:5]
    for name, parameter in own.items():
        parameter.copy_(state[name])


def join_attention_biases(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The three biases of each attention as one tensor.

    Softmax ignores what is added to all keys, so that the gradient of their bias is 0 but for
    rounding, and has no scale of its own to be compared on.
    """
    joined = dict(grads)
    for name in grads:
        if name.endswith(".key.bias"):
            attention = name.removesuffix(".key.bias")
            parts = [joined.pop(f"{attention}.{part}.bias") for part in ("query", "key", "value")]
            joined[f"{attention}.bias"] = torch.cat(parts)
    return joined
