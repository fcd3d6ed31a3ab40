"""What config a Q-Former's weights were made with, read off their shapes."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from latentmodal.bridges.alignment import AlignmentHeadConfig
from latentmodal.bridges.qformer import QFormerConfig

HEAD_WIDTH = 64
"""Of BERT, whatever its size."""

_LAYER = re.compile(r"bridge\.layers\.(\d+)\.")
_CROSSING = re.compile(r"bridge\.layers\.(\d+)\.cross_attention\.")


class QFormerConfigs(NamedTuple):
    """The two components a checkpoint holds weights of."""

    bridge: QFormerConfig
    head: AlignmentHeadConfig | None
    """None where there is none of its weights."""


def qformer_config_of(state: Mapping[str, Tensor], heads: int | None = None) -> QFormerConfigs:
    """Configs that fit weights under our names (`bridge.`, `head.`); other keys do not matter.

    What leaves no trace in shapes (dropout, bounds of the temperature) has its default.

    Args:
        state: as a converter of this package returns it.
        heads: number of attention heads; default: as many as are 64 wide.

    Raises:
        ValueError: weights whose shapes are needed are missing, cross-attention is at irregular
            places, or `heads` must be given.
    """
    needed = {
        name: f"bridge.{name}"
        for name in ("queries", "feature_kv.0.key.weight", "layers.0.query_mlp.up.weight")
    }
    if missing := [key for key in needed.values() if key not in state]:
        raise ValueError(f"these are no weights of a Q-Former: {', '.join(missing)} missing")
    _, num_queries, width = state[needed["queries"]].shape
    if heads is None:
        if width % HEAD_WIDTH:
            raise ValueError(
                f"width {width} does not divide into heads of {HEAD_WIDTH}; give heads"
            )
        heads = width // HEAD_WIDTH
    vocab_size = _size(state, "bridge.word_embed.weight")
    layers = 1 + max(_numbers(_LAYER, state))
    crossing = _numbers(_CROSSING, state)
    every = crossing[1] if len(crossing) > 1 else layers
    if crossing != list(range(0, layers, every)):
        raise ValueError(
            f"layers {', '.join(map(str, crossing))} of {layers} have cross-attention; a Q-Former "
            "has it in layers 0, n, 2n, …"
        )
    bridge = QFormerConfig(
        in_dim=state[needed["feature_kv.0.key.weight"]].shape[1],
        out_dim=_size(state, "bridge.proj.weight"),
        num_queries=num_queries,
        width=width,
        layers=layers,
        heads=heads,
        mlp_dim=state[needed["layers.0.query_mlp.up.weight"]].shape[0],
        cross_attention_every=every,
        vocab_size=vocab_size,
        max_positions=_size(state, "bridge.position_embed.weight") or 512,
        input_norm="bridge.input_norm.weight" in state,
        num_input_positions=_size(state, "bridge.input_positions", 1),
        captioning=vocab_size is None
        or any(key.startswith("bridge.caption_head.") for key in state),
    )
    embed_dim = _size(state, "head.image_proj.weight")
    matching = "head.itm_head.weight" in state
    if embed_dim is None and not matching:
        return QFormerConfigs(bridge, None)
    head = AlignmentHeadConfig(
        width=width,
        **({} if embed_dim is None else {"embed_dim": embed_dim}),
        contrastive=embed_dim is not None,
        matching=matching,
    )
    return QFormerConfigs(bridge, head)


def _numbers(pattern: re.Pattern[str], state: Mapping[str, Tensor]) -> list[int]:
    return sorted({int(match[1]) for key in state if (match := pattern.match(key))})


def _size(state: Mapping[str, Tensor], key: str, dim: int = 0) -> int | None:
    return state[key].shape[dim] if key in state else None
