"""The name maps: open_clip and OpenAI, CLIPModel and SiglipModel of transformers, and timm.

Ours are the names of `TimmImageEncoder`, `TextTransformer` and a contrastive head under the
prefixes `image_encoder.`, `text_encoder.` and `head.`; the head holds `image_proj`, `text_proj`
(linear layers), `logit_scale` and `logit_bias`. All functions are pure, dict to dict, exact in both
directions, and list the keys they have no name for.
"""

from collections.abc import Sequence

from torch import Tensor

from latentmodal.encoders.convert.rules import (
    CLASS_TOKEN,
    JOIN_QKV,
    POSITIONS,
    SCALAR,
    SPLIT_Q_KV,
    TRANSPOSE,
    Converted,
    Rule,
    StateDict,
    convert,
)

_IMAGE, _TEXT, _HEAD = "image_encoder.trunk", "text_encoder", "head"

# Buffers and constants that checkpoints carry but no tower of ours holds.
_IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")


def _open_clip_blocks(theirs: str, ours: str) -> list[Rule]:
    theirs, ours = f"{theirs}.{{i}}", f"{ours}.blocks.{{i}}"
    return [
        Rule(f"{theirs}.ln_1.{{rest}}", f"{ours}.norm1.{{rest}}"),
        Rule(f"{theirs}.attn.in_proj_{{rest}}", f"{ours}.attn.qkv.{{rest}}"),
        Rule(f"{theirs}.attn.out_proj.{{rest}}", f"{ours}.attn.proj.{{rest}}"),
        Rule(f"{theirs}.ln_2.{{rest}}", f"{ours}.norm2.{{rest}}"),
        Rule(f"{theirs}.mlp.c_fc.{{rest}}", f"{ours}.mlp.fc1.{{rest}}"),
        Rule(f"{theirs}.mlp.c_proj.{{rest}}", f"{ours}.mlp.fc2.{{rest}}"),
    ]


def _hf_blocks(theirs: str, ours: str) -> list[Rule]:
    theirs, ours = f"{theirs}.encoder.layers.{{i}}", f"{ours}.blocks.{{i}}"
    q, k, v = (f"{theirs}.self_attn.{x}_proj.{{rest}}" for x in "qkv")
    return [
        Rule(f"{theirs}.layer_norm1.{{rest}}", f"{ours}.norm1.{{rest}}"),
        Rule((q, k, v), f"{ours}.attn.qkv.{{rest}}", JOIN_QKV),
        Rule(f"{theirs}.self_attn.out_proj.{{rest}}", f"{ours}.attn.proj.{{rest}}"),
        Rule(f"{theirs}.layer_norm2.{{rest}}", f"{ours}.norm2.{{rest}}"),
        Rule(f"{theirs}.mlp.{{rest}}", f"{ours}.mlp.{{rest}}"),
    ]


_OPEN_CLIP_VISUAL = [
    Rule("visual.conv1.weight", f"{_IMAGE}.patch_embed.proj.weight"),
    Rule("visual.class_embedding", f"{_IMAGE}.cls_token", CLASS_TOKEN),
    Rule("visual.positional_embedding", f"{_IMAGE}.pos_embed", POSITIONS),
    Rule("visual.ln_pre.{rest}", f"{_IMAGE}.norm_pre.{{rest}}"),
    *_open_clip_blocks("visual.transformer.resblocks", _IMAGE),
    Rule("visual.ln_post.{rest}", f"{_IMAGE}.norm.{{rest}}"),
    Rule("visual.proj", f"{_HEAD}.image_proj.weight", TRANSPOSE),
]

_OPEN_CLIP_TIMM_VISUAL = [
    Rule("visual.trunk.{rest}", f"{_IMAGE}.{{rest}}"),
    Rule("visual.head.proj.{rest}", f"{_HEAD}.image_proj.{{rest}}"),
]

_SCALARS = [
    Rule("logit_scale", f"{_HEAD}.logit_scale", SCALAR),
    Rule("logit_bias", f"{_HEAD}.logit_bias", SCALAR),
]


def _open_clip_text(prefix: str, *, linear_projection: bool) -> list[Rule]:
    if linear_projection:
        projection = Rule(f"{prefix}text_projection.{{rest}}", f"{_HEAD}.text_proj.{{rest}}")
    else:
        projection = Rule(f"{prefix}text_projection", f"{_HEAD}.text_proj.weight", TRANSPOSE)
    return [
        Rule(f"{prefix}token_embedding.weight", f"{_TEXT}.token_embed.weight"),
        Rule(f"{prefix}positional_embedding", f"{_TEXT}.pos_embed"),
        *_open_clip_blocks(f"{prefix}transformer.resblocks", _TEXT),
        Rule(f"{prefix}ln_final.{{rest}}", f"{_TEXT}.norm.{{rest}}"),
        projection,
    ]


_HF_TEXT = [
    Rule("text_model.embeddings.token_embedding.weight", f"{_TEXT}.token_embed.weight"),
    Rule("text_model.embeddings.position_embedding.weight", f"{_TEXT}.pos_embed"),
    *_hf_blocks("text_model", _TEXT),
    Rule("text_model.final_layer_norm.{rest}", f"{_TEXT}.norm.{{rest}}"),
]

_HF_VISION = [
    Rule("vision_model.embeddings.patch_embedding.{rest}", f"{_IMAGE}.patch_embed.proj.{{rest}}"),
    Rule("vision_model.embeddings.position_embedding.weight", f"{_IMAGE}.pos_embed", POSITIONS),
    *_hf_blocks("vision_model", _IMAGE),
    Rule("vision_model.post_layernorm.{rest}", f"{_IMAGE}.norm.{{rest}}"),
]

_HF_CLIP = [
    *_HF_VISION,
    Rule("vision_model.embeddings.class_embedding", f"{_IMAGE}.cls_token", CLASS_TOKEN),
    Rule("vision_model.pre_layrnorm.{rest}", f"{_IMAGE}.norm_pre.{{rest}}"),  # sic
    *_HF_TEXT,
    Rule("visual_projection.{rest}", f"{_HEAD}.image_proj.{{rest}}"),
    Rule("text_projection.{rest}", f"{_HEAD}.text_proj.{{rest}}"),
    *_SCALARS,
]

_POOL = f"{_IMAGE}.attn_pool"
_HF_SIGLIP = [
    *_HF_VISION,
    Rule("vision_model.head.probe", f"{_POOL}.latent"),
    Rule(
        "vision_model.head.attention.in_proj_{rest}",
        (f"{_POOL}.q.{{rest}}", f"{_POOL}.kv.{{rest}}"),
        SPLIT_Q_KV,
    ),
    Rule("vision_model.head.attention.out_proj.{rest}", f"{_POOL}.proj.{{rest}}"),
    Rule("vision_model.head.layernorm.{rest}", f"{_POOL}.norm.{{rest}}"),
    Rule("vision_model.head.mlp.{rest}", f"{_POOL}.mlp.{{rest}}"),
    *_HF_TEXT,
    Rule("text_model.head.{rest}", f"{_HEAD}.text_proj.{{rest}}"),
    Rule("logit_scale", f"{_HEAD}.logit_scale"),  # (1,) in SiglipModel as well
    Rule("logit_bias", f"{_HEAD}.logit_bias"),
]

_TIMM = [Rule("{rest}", f"{_IMAGE}.{{rest}}")]


def from_open_clip(state: StateDict) -> Converted:
    """open_clip's CLIP and CustomTextCLIP, with its own ViT or a timm tower; OpenAI's ViT names."""
    timm_visual = any(key.startswith("visual.trunk.") for key in state)
    prefix = "text." if any(key.startswith("text.") for key in state) else ""
    linear = f"{prefix}text_projection.weight" in state
    return _from(state, _open_clip_rules(timm_visual, prefix, linear))


def to_open_clip(
    state: StateDict, *, timm_visual: bool = False, custom_text: bool = False
) -> Converted:
    """Ours to open_clip: by default the layout of its `CLIP` class.

    Args:
        timm_visual: the image tower is timm's (`visual.trunk.`), as in its SigLIP models.
        custom_text: the layout of `CustomTextCLIP` (text tower under `text.`), as in SigLIP.
    """
    linear = f"{_HEAD}.text_proj.bias" in state  # the bias-free projection is a bare matrix there
    return convert(state, _open_clip_rules(timm_visual, "text." * custom_text, linear), "theirs")


def from_hf_clip(state: StateDict) -> Converted:
    """`CLIPModel` of transformers to ours."""
    return _from(state, _HF_CLIP)


def to_hf_clip(state: StateDict) -> Converted:
    """Ours to `CLIPModel`, which has no logit bias and no projection biases."""
    return convert(state, _HF_CLIP, "theirs")


def from_hf_siglip(state: StateDict) -> Converted:
    """`SiglipModel` of transformers to ours; its image tower has no projection."""
    return _from(state, _HF_SIGLIP)


def to_hf_siglip(state: StateDict) -> Converted:
    """Ours to `SiglipModel`."""
    return convert(state, _HF_SIGLIP, "theirs")


def from_timm(state: StateDict) -> Converted:
    """A timm model's weights to ours; a classifier (`head.weight`, `head.bias`) is left out."""
    return _from(state, _TIMM, classifier=("head.weight", "head.bias"))


def to_timm(state: StateDict) -> Converted:
    """The image tower of ours as a timm state dict; everything else is unmatched."""
    return convert(state, _TIMM, "theirs")


def _open_clip_rules(timm_visual: bool, text_prefix: str, linear: bool) -> list[Rule]:
    visual = _OPEN_CLIP_TIMM_VISUAL if timm_visual else _OPEN_CLIP_VISUAL
    return [*visual, *_open_clip_text(text_prefix, linear_projection=linear), *_SCALARS]


def _from(state: StateDict, rules: Sequence[Rule], classifier: tuple[str, ...] = ()) -> Converted:
    kept: dict[str, Tensor] = {
        key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in _IGNORED
    }
    result = convert(
        {key: tensor for key, tensor in kept.items() if key not in classifier}, rules, "ours"
    )
    left_out = [key for key in classifier if key in kept]
    return Converted(result.state, sorted([*result.unmatched, *left_out]))
