"""Towers and head as transformers' `CLIPModel` or `SiglipModel`."""

from __future__ import annotations

import json
from typing import Any

import torch
from timm.models import VisionTransformer
from transformers import CLIPConfig, CLIPModel, PretrainedConfig, SiglipConfig, SiglipModel

from latentmodal.encoders import Preprocess, TextTransformer
from latentmodal.encoders.convert import Converted, to_hf_clip, to_hf_siglip
from latentmodal.experiments.exports.export import Export, epsilon, require, shown, vit_and_text
from latentmodal.experiments.systems.dual_encoder import DualEncoder

_HF_ACTIVATION = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_HF_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's filter numbers


def hf_clip(model: DualEncoder, _with_config: bool) -> Export:
    """CLIPModel: class token, causal text tower read at its end, bias-free projections."""
    trunk, text = vit_and_text(model, "CLIPModel")
    require(
        "CLIPModel",
        {
            f"an image tower pooled by '{trunk.global_pool}' (it reads the class token)": (
                trunk.global_pool == "token"
            ),
            "a bidirectional text tower": text.config.causal,
            f"texts pooled by '{text.config.pooling}' (it reads the end-of-text token)": (
                text.config.pooling == "eot"
            ),
            # There 2 stands for configurations older than the field: the highest id is read.
            "an end-of-text token of id 2": text.config.eot_id != 2,
        },
    )
    config = CLIPConfig(
        text_config=_hf_text(text),
        vision_config=_hf_vision(model, trunk),
        projection_dim=model.head.config.embed_dim,
        logit_scale_init_value=model.head.config.init_logit_scale,
        architectures=["CLIPModel"],
    )
    return _hf_export(model, to_hf_clip(model.state_dict()), CLIPModel, config)


def hf_siglip(model: DualEncoder, _with_config: bool) -> Export:
    """SiglipModel: attention-pooled image tower without projection, text read at its last place."""
    trunk, text = vit_and_text(model, "SiglipModel")
    require(
        "SiglipModel",
        {
            f"an image tower pooled by '{trunk.global_pool}' (it pools by attention)": (
                trunk.global_pool == "map"
            ),
            "a causal text tower": not text.config.causal,
            f"texts pooled by '{text.config.pooling}' (it reads the last position)": (
                text.config.pooling == "last"
            ),
            "a text tower that masks padding": not text.config.mask_padding,
        },
    )
    config = SiglipConfig(
        text_config={**_hf_text(text), "projection_size": model.head.config.embed_dim},
        vision_config=_hf_vision(model, trunk),
        architectures=["SiglipModel"],
    )
    return _hf_export(model, to_hf_siglip(model.state_dict()), SiglipModel, config)


def _hf_export(
    model: DualEncoder, converted: Converted, kind: type, config: PretrainedConfig
) -> Export:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    strange = [*converted.unmatched, *sorted(converted.state.keys() - expected.keys())]
    lacking = sorted(expected.keys() - converted.state.keys())
    if strange:
        raise ValueError(f"{kind.__name__} has no place for {shown(strange)}")
    if lacking:
        raise ValueError(f"{kind.__name__} needs {shown(lacking)}, which this model lacks")
    for name, shape in expected.items():
        if converted.state[name].shape != shape:
            found = tuple(converted.state[name].shape)
            raise ValueError(f"{kind.__name__} expects {name} as {tuple(shape)}, not {found}")
    processor = hf_processor(model.image_encoder.preprocess)
    configs = {
        "config.json": config.to_json_string(),
        "preprocessor_config.json": json.dumps(processor, indent=2),
    }
    return Export(converted.state, configs=configs)


def _hf_vision(model: DualEncoder, trunk: VisionTransformer) -> dict[str, Any]:
    block = trunk.blocks[0]
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.image_encoder.preprocess.size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": _hf_activation("image_encoder", model.image_encoder.activation),
        "layer_norm_eps": epsilon(block.norm1),
    }


def _hf_text(text: TextTransformer) -> dict[str, Any]:
    config = text.config
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "hidden_act": _hf_activation("text_encoder", text.activation),
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": config.pad_id,
        "bos_token_id": None,  # the tokenizer's business; no tower reads it
        "eos_token_id": config.eot_id,
    }


def _hf_activation(tower: str, activation: str | None) -> str:
    if activation is None:
        raise ValueError(f"{tower} uses an activation other than {', '.join(_HF_ACTIVATION)}")
    return _HF_ACTIVATION[activation]


def hf_processor(preprocess: Preprocess) -> dict[str, Any]:
    """`preprocessor_config.json` of what evaluation does to a picture."""
    size, crop = preprocess.size, preprocess.resize == "crop"
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crop else square,
        "resample": _HF_RESAMPLE[preprocess.interpolation],
        **({"do_center_crop": True, "crop_size": square} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
