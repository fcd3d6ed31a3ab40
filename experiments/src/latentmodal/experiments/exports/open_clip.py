"""Towers and head as open_clip's own ViT, or as its adapter round a timm tower."""

from __future__ import annotations

import json
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from latentmodal.encoders import TextTransformer, TimmImageConfig, TimmImageEncoder
from latentmodal.encoders.convert import to_open_clip
from latentmodal.experiments.exports.export import Export, epsilon, require, shown
from latentmodal.experiments.systems.dual_encoder import DualEncoder


def open_clip(model: DualEncoder, with_config: bool) -> Export:
    """open_clip's own ViT where the tower is one, else its adapter round a timm tower."""
    image, text = model.image_encoder, model.text_encoder
    if not isinstance(image, TimmImageEncoder) or not isinstance(text, TextTransformer):
        raise ValueError("open_clip takes the image_encoder timm and the text_encoder transformer")
    require("open_clip", {"a text tower that masks padding": not text.config.mask_padding})
    converted = to_open_clip(model.state_dict())
    own = {"visual.class_embedding", "visual.ln_pre.weight", "visual.proj"} <= set(converted.state)
    own = own and not converted.unmatched and image.trunk.global_pool == "token"
    if not own:
        converted = to_open_clip(model.state_dict(), timm_visual=True, custom_text=True)
    if converted.unmatched:
        raise ValueError(f"open_clip has no place for {shown(converted.unmatched)}")
    configs = {}
    if with_config:
        vision = (
            _open_clip_vision(image, text) if own else _open_clip_timm(image, model.head.image_proj)
        )
        config = _open_clip_config(model, vision, custom_text=not own)
        configs = {"open_clip_config.json": json.dumps(config, indent=2)}
    return Export(converted.state, "open_clip_model.safetensors", configs)


def _open_clip_config(
    model: DualEncoder, vision: dict[str, Any], *, custom_text: bool
) -> dict[str, Any]:
    preprocess = model.image_encoder.preprocess
    config: dict[str, Any] = {
        "embed_dim": model.head.config.embed_dim,
        "quick_gelu": model.text_encoder.activation == "quick_gelu",
        "custom_text": custom_text,
        "vision_cfg": {"image_size": preprocess.size, **vision},
        "text_cfg": _open_clip_text(model),
    }
    if model.head.logit_bias is not None:
        config["init_logit_bias"] = model.head.config.init_logit_bias
    return {
        "model_cfg": config,
        "preprocess_cfg": {
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": "squash" if preprocess.resize == "squash" else "shortest",
        },
    }


def _open_clip_vision(image: TimmImageEncoder, text: TextTransformer) -> dict[str, Any]:
    trunk, block = image.trunk, image.trunk.blocks[0]
    if image.activation != text.activation:
        raise ValueError(
            f"open_clip has one activation for both towers, but the image tower uses "
            f"{image.activation} and the text tower {text.activation}; write a .safetensors file"
        )
    return {
        "layers": len(trunk.blocks),
        "width": trunk.embed_dim,
        "head_width": trunk.embed_dim // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / trunk.embed_dim,
        "patch_size": trunk.patch_embed.patch_size[0],
        "norm_kwargs": {"eps": epsilon(block.norm1)},
        **_approximation(image.activation),
    }


def _open_clip_timm(image: TimmImageEncoder, projection: nn.Module) -> dict[str, Any]:
    config = image.config
    with torch.device("meta"):
        plain = TimmImageConfig(model=config.model, pool=config.pool).build()
    if (
        _shapes(plain) != _shapes(image)
        or plain.activation != image.activation
        or plain.preprocess.size != image.preprocess.size
    ):
        raise ValueError(
            f"open_clip builds {config.model} only as timm names it, without model_kwargs, another "
            "activation or image_size; write a .safetensors file and build the tower yourself"
        )
    pool = image.trunk.global_pool if isinstance(image.trunk, VisionTransformer) else ""
    linear = isinstance(projection, nn.Linear)
    return {
        "timm_model_name": config.model,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": "linear" if linear else "none",
        "timm_proj_bias": linear and projection.bias is not None,
    }


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _open_clip_text(model: DualEncoder) -> dict[str, Any]:
    assert isinstance(model.text_encoder, TextTransformer)
    config = model.text_encoder.config
    highest = config.eot_id == config.vocab_size - 1
    poolings = {"last": "last", "first": "first", "eot": "argmax" if highest else "eos"}
    if config.pooling not in poolings:
        raise ValueError(f"open_clip has no place for texts pooled by '{config.pooling}'")
    return {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "heads": config.heads,
        "layers": config.depth,
        "mlp_ratio": config.mlp_ratio,
        "no_causal_mask": not config.causal,
        "pool_type": poolings[config.pooling],
        "eos_id": config.eot_id,
        "pad_id": config.pad_id,
        "proj_type": model.head.config.text_projection,
        "proj_bias": model.head.config.text_bias,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        **_approximation(model.text_encoder.activation),
    }


def _approximation(activation: str | None) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}
