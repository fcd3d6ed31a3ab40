"""A trained run's towers and head under the names of another library, ready for it to load.

What a state dict does not show (heads, activation, epsilons, pooling, pixels) goes into the other
library's configuration beside the weights; a tower it cannot describe is refused, never bent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PretrainedConfig, SiglipConfig, SiglipModel

from latentmodal.encoders import Preprocess, TextTransformer, TimmImageConfig, TimmImageEncoder
from latentmodal.encoders.convert import (
    Activations,
    Converted,
    save_dual_encoder_weights,
    to_hf_clip,
    to_hf_siglip,
    to_open_clip,
)
from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.run import load_system
from latentmodal.experiments.files import write_atomically, write_text_atomically
from latentmodal.experiments.systems.dual_encoder import DualEncoder
from latentmodal.experiments.training.checkpoints import SUFFIX
from latentmodal.experiments.training.run_folder import RunFolder

_HF_ACTIVATION = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_HF_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's filter numbers
_REMEDY = "free space or choose another target"


@dataclass(frozen=True)
class Export:
    """Weights under foreign names, and the JSON files that describe them, as text."""

    state: Mapping[str, Tensor]
    weights_name: str = "model.safetensors"
    configs: Mapping[str, str] = field(default_factory=dict)


def convert_run(source: Path, target: Path, to: str) -> None:
    """Write the two towers and the head of a run for another library.

    Args:
        source: a run's folder (its newest checkpoint), or one of the checkpoints in it.
        target: a `.safetensors` file for the weights alone, or a folder for weights and
            configuration, which `CLIPModel.from_pretrained`, `SiglipModel.from_pretrained` or
            open_clip's `local-dir:` then reads.
        to: `open_clip`, `hf_clip`, `hf_siglip`, or `latentmodal` for `system.weights` of a recipe.

    Raises:
        UserError: no such run, unknown `to`, or towers the other library has no place for.
    """
    if to not in _EXPORTS and to != "latentmodal":
        raise UserError(f"--to {to}: unknown; {nearest(to, [*_EXPORTS, 'latentmodal'])}")
    single = target.suffix == ".safetensors"
    if not single and (target.is_file() or target.suffix in (".pt", ".pth", ".bin", SUFFIX)):
        raise UserError(f"{target}: give a folder, or a file that ends in .safetensors")
    model = _load_model(source)
    if to == "latentmodal":
        _write_ours(target if single else target / "model.safetensors", model)
        return
    try:
        export = _EXPORTS[to](model, not single)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    path = target if single else target / export.weights_name
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in export.state.items()}
    # transformers insists on the note saying that a PyTorch program wrote the file.
    write_atomically(path, lambda file: file.write(save(tensors, {"format": "pt"})), _REMEDY)
    for name, text in export.configs.items():
        if not single:
            write_text_atomically(target / name, text, _REMEDY)


def _load_model(source: Path) -> DualEncoder:
    if source.suffix == SUFFIX:
        run, checkpoint = RunFolder(source.parent.parent), source
        run.recipe()
    else:
        run = RunFolder(source)
        run.recipe()
        checkpoint = run.checkpoint()
    system, _ = load_system(run, checkpoint)
    if not isinstance(system.model, DualEncoder):
        raise UserError(f"{source}: holds no pair of image and text tower; only those convert")
    return system.model


def _write_ours(path: Path, model: DualEncoder) -> None:
    activations = Activations(model.image_encoder.activation, model.text_encoder.activation)

    def write(file: BinaryIO) -> None:
        try:
            save_dual_encoder_weights(file.name, model.state_dict(), activations=activations)
        except SafetensorError as error:  # its way of passing on what the disk said
            raise OSError(str(error)) from error

    write_atomically(path, write, _REMEDY)


def _hf_clip(model: DualEncoder, _with_config: bool) -> Export:
    """CLIPModel: class token, causal text tower read at its end, bias-free projections."""
    trunk, text = _transformers(model, "CLIPModel")
    _require(
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


def _hf_siglip(model: DualEncoder, _with_config: bool) -> Export:
    """SiglipModel: attention-pooled image tower without projection, text read at its last place."""
    trunk, text = _transformers(model, "SiglipModel")
    _require(
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


def _transformers(model: DualEncoder, library: str) -> tuple[VisionTransformer, TextTransformer]:
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


def _require(library: str, fits: Mapping[str, bool]) -> None:
    if wrong := [what for what, fit in fits.items() if not fit]:
        raise ValueError(f"{library} has no place for {', '.join(wrong)}")


def _hf_export(
    model: DualEncoder, converted: Converted, kind: type, config: PretrainedConfig
) -> Export:
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    strange = [*converted.unmatched, *sorted(converted.state.keys() - expected.keys())]
    lacking = sorted(expected.keys() - converted.state.keys())
    if strange:
        raise ValueError(f"{kind.__name__} has no place for {_shown(strange)}")
    if lacking:
        raise ValueError(f"{kind.__name__} needs {_shown(lacking)}, which this model lacks")
    for name, shape in expected.items():
        if converted.state[name].shape != shape:
            found = tuple(converted.state[name].shape)
            raise ValueError(f"{kind.__name__} expects {name} as {tuple(shape)}, not {found}")
    processor = _hf_processor(model.image_encoder.preprocess)
    configs = {
        "config.json": config.to_json_string(),
        "preprocessor_config.json": json.dumps(processor, indent=2),
    }
    return Export(converted.state, configs=configs)


def _shown(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
        "layer_norm_eps": _epsilon(block.norm1),
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


def _epsilon(norm: nn.Module) -> float:
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"image_encoder normalises by {type(norm).__name__}; LayerNorm is needed")
    return norm.eps


def _hf_processor(preprocess: Preprocess) -> dict[str, Any]:
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


def _open_clip(model: DualEncoder, with_config: bool) -> Export:
    """open_clip's own ViT where the tower is one, else its adapter round a timm tower."""
    image, text = model.image_encoder, model.text_encoder
    if not isinstance(image, TimmImageEncoder) or not isinstance(text, TextTransformer):
        raise ValueError("open_clip takes the image_encoder timm and the text_encoder transformer")
    _require("open_clip", {"a text tower that masks padding": not text.config.mask_padding})
    converted = to_open_clip(model.state_dict())
    own = {"visual.class_embedding", "visual.ln_pre.weight", "visual.proj"} <= set(converted.state)
    own = own and not converted.unmatched and image.trunk.global_pool == "token"
    if not own:
        converted = to_open_clip(model.state_dict(), timm_visual=True, custom_text=True)
    if converted.unmatched:
        raise ValueError(f"open_clip has no place for {_shown(converted.unmatched)}")
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
        "norm_kwargs": {"eps": _epsilon(block.norm1)},
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


_EXPORTS: dict[str, Callable[[DualEncoder, bool], Export]] = {
    "open_clip": _open_clip,
    "hf_clip": _hf_clip,
    "hf_siglip": _hf_siglip,
}
