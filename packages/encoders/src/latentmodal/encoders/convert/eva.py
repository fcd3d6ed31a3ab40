"""The EVA ViT of BLIP-2: names of LAVIS and of transformers' `Blip2VisionModel`, and timm's.

timm names are those of its `Eva` class, without a prefix; `from_timm` adds the one of our encoder.
LAVIS' are the same under `visual_encoder.`; its bare weight file (eva_vit_g.pth) has timm's names
as they are. transformers keeps one bias for q, k and v, whose middle third is zero.

Only the tower is mapped. Every other key, `ln_vision` of LAVIS and its twin
`vision_model.post_layernorm` of transformers among them, is listed in `Converted.unmatched`, as are
keys of another vision tower: callers decide which of those they expected. All functions are pure
and exact in both directions.

Shapes: N tokens, P prefix tokens, D width, H/W patches down and across.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentmodal.encoders.convert.rules import Converted, Op, Rule, StateDict, Tensors, convert

_LAVIS, _HF = "visual_encoder", "vision_model"
_HF_BLOCK = f"{_HF}.encoder.layers.{{i}}"

# What rounding may leave of a bias that is zero. It has no effect at any size: softmax ignores what
# shifts all logits of a row alike.
_ZERO = 1e-5


def _drop_key_bias(tensors: Tensors) -> Tensors:
    query, _, value = (part.clone() for part in tensors[0].chunk(3))
    return query, value


def _add_key_bias(tensors: Tensors) -> Tensors:
    query, value = tensors
    return (torch.cat([query, torch.zeros_like(query), value]),)


_LAVIS_RULES = [
    Rule(f"{_LAVIS}.{name}", name)
    for name in (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.{rest}",
        "blocks.{i}.norm1.{rest}",
        "blocks.{i}.attn.qkv.weight",
        "blocks.{i}.attn.q_bias",
        "blocks.{i}.attn.v_bias",
        "blocks.{i}.attn.proj.{rest}",
        "blocks.{i}.norm2.{rest}",
        "blocks.{i}.mlp.fc1.{rest}",
        "blocks.{i}.mlp.fc2.{rest}",
    )
]

_HF_RULES = [
    Rule(f"{_HF}.embeddings.class_embedding", "cls_token"),
    Rule(f"{_HF}.embeddings.position_embedding", "pos_embed"),
    Rule(f"{_HF}.embeddings.patch_embedding.{{rest}}", "patch_embed.proj.{rest}"),
    Rule(f"{_HF_BLOCK}.layer_norm1.{{rest}}", "blocks.{i}.norm1.{rest}"),
    Rule(f"{_HF_BLOCK}.self_attn.qkv.weight", "blocks.{i}.attn.qkv.weight"),
    Rule(
        f"{_HF_BLOCK}.self_attn.qkv.bias",
        ("blocks.{i}.attn.q_bias", "blocks.{i}.attn.v_bias"),
        Op(_drop_key_bias, _add_key_bias),
    ),
    Rule(f"{_HF_BLOCK}.self_attn.projection.{{rest}}", "blocks.{i}.attn.proj.{rest}"),
    Rule(f"{_HF_BLOCK}.layer_norm2.{{rest}}", "blocks.{i}.norm2.{rest}"),
    Rule(f"{_HF_BLOCK}.mlp.fc1.{{rest}}", "blocks.{i}.mlp.fc1.{rest}"),
    Rule(f"{_HF_BLOCK}.mlp.fc2.{{rest}}", "blocks.{i}.mlp.fc2.{rest}"),
]


def eva_from_lavis(state: StateDict) -> Converted:
    """`visual_encoder.*` of a LAVIS checkpoint to timm's names."""
    return convert(state, _LAVIS_RULES, "ours")


def eva_to_lavis(state: StateDict) -> Converted:
    """The inverse of `eva_from_lavis`."""
    return convert(state, _LAVIS_RULES, "theirs")


def eva_from_hf_blip2(state: StateDict) -> Converted:
    """`vision_model.*` of transformers' BLIP-2 classes to timm's names.

    Raises:
        ValueError: a key bias is not zero; timm and LAVIS have no place for it.
    """
    for name, tensor in state.items():
        if name.startswith(f"{_HF}.") and name.endswith(".self_attn.qkv.bias"):
            largest = tensor.chunk(3)[1].abs().max().item()
            if largest > _ZERO:
                raise ValueError(
                    f"{name}: its middle third, the key bias, reaches {largest:.3g} where EVA has "
                    "zeros; zero it (attention does not change) or check that this is EVA"
                )
    return convert(state, _HF_RULES, "ours")


def eva_to_hf_blip2(state: StateDict) -> Converted:
    """The inverse of `eva_from_hf_blip2`, with zeros for the key biases."""
    return convert(state, _HF_RULES, "theirs")


def resize_positions(
    positions_1ND: Tensor, grid: tuple[int, int], *, num_prefix_tokens: int = 1
) -> Tensor:
    """Learned positions for another picture size, as LAVIS and transformers' BLIP-2 resize them.

    Bicubic over the square of patch positions, align_corners off. timm antialiases, which with
    torch selects another cubic kernel: its result differs by several per cent, also when growing.

    Args:
        positions_1ND: positions of the prefix tokens, which stay as they are, and of the patches.
        grid: patches down and across.
    """
    prefix_1PD, patches_1ND = positions_1ND.split(
        [num_prefix_tokens, positions_1ND.shape[1] - num_prefix_tokens], dim=1
    )
    side = round(patches_1ND.shape[1] ** 0.5)
    if (side, side) == tuple(grid):
        return positions_1ND
    map_1DHW = patches_1ND.transpose(1, 2).unflatten(2, (side, side)).float()
    map_1DHW = F.interpolate(map_1DHW, size=grid, mode="bicubic", align_corners=False)
    resized_1ND = map_1DHW.flatten(2).transpose(1, 2).to(positions_1ND.dtype)
    return torch.cat([prefix_1PD, resized_1ND], dim=1)
