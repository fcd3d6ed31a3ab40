"""The two sides of `contrastive_step.py`: open_clip's training step and ours, on equal inputs.

Legend: B pairs, T text length, C H W pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import open_clip
import timm
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_step import TrainingStep, Work

from latentmodal.bridges.losses import info_nce, sigmoid_loss
from latentmodal.encoders.convert import from_open_clip, to_open_clip
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.contrastive import ContrastiveConfig

Model = Literal["clip", "siglip"]
TINY_TRUNK = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
TINY_TEXT = {"vocab_size": 64, "context_length": 16, "depth": 2, "heads": 2}
TINY_WIDTH = {"clip": 32, "siglip": 64}  # SigLIP's image tower has no projection
MEAN_STD = {
    "clip": (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sides of a comparison share."""

    model: Model
    tiny: bool
    quick_gelu: bool
    device: str
    threads: int
    weights: str
    """open_clip's weights, as safetensors."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One row of the table."""

    name: str
    library: Literal["open_clip", "ours"]
    batch: int
    tokens: Literal["padded", "trimmed"] = "padded"
    chunk: int | None = None
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One batch, as each library's loader would deliver it."""

    pixels_BCHW: Tensor
    """uint8."""
    normalised_BCHW: Tensor
    ids_BT: Tensor
    lengths_B: Tensor

    @property
    def mask_BT(self) -> Tensor:
        return torch.arange(self.ids_BT.shape[1]) < self.lengths_B[:, None]


def our_config(setup: Setup) -> ContrastiveConfig:
    """The system of the recipe, with the activation asked for."""
    overrides = _tiny_overrides(setup.model) if setup.tiny else []
    if setup.model == "clip":
        activation = "quick_gelu" if setup.quick_gelu else "gelu"
        overrides += [
            f"system.{tower}_encoder.activation={activation}" for tower in ("image", "text")
        ]
    name = {"clip": "clip/vit_b32", "siglip": "clip/siglip_b16"}[setup.model]
    system = load_recipe(name, overrides).system
    assert isinstance(system, ContrastiveConfig)
    return system


def _tiny_overrides(model: Model) -> list[str]:
    image, text, width = "system.image_encoder", "system.text_encoder", TINY_WIDTH[model]
    overrides = [
        f"{image}.image_size=32",
        f"{text}.width={width}",
        f"system.head.embed_dim={width}",
    ]
    overrides += [f"{image}.model_kwargs.{key}={value}" for key, value in TINY_TRUNK.items()]
    overrides += [f"{text}.{key}={value}" for key, value in TINY_TEXT.items()]
    if model == "clip":
        overrides.append(f"{text}.eot_id=63")
    return overrides


def their_model(setup: Setup) -> nn.Module:
    """open_clip's model with its own initialisation."""
    scalars: dict[str, float] = {}
    if setup.model == "siglip":
        scalars = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    if setup.tiny:
        return _their_tiny_model(setup, scalars)
    logging.getLogger().setLevel(logging.ERROR)  # it warns that the weights are random
    name = {"clip": "ViT-B-32", "siglip": "ViT-B-16-SigLIP"}[setup.model]
    quick_gelu = setup.quick_gelu and setup.model == "clip"
    model: nn.Module = open_clip.create_model(
        name, pretrained=None, force_quick_gelu=quick_gelu, output_dict=True, **scalars
    )
    return model


def _their_tiny_model(setup: Setup, scalars: dict[str, float]) -> nn.Module:
    width = TINY_WIDTH[setup.model]
    text: dict[str, Any] = {
        "context_length": 16,
        "vocab_size": 64,
        "heads": 2,
        "layers": 2,
        "width": width,
    }
    if setup.model == "clip":
        vision: dict[str, Any] = {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
        }
        small: nn.Module = open_clip.CLIP(
            width, vision, text, quick_gelu=setup.quick_gelu, output_dict=True
        )
        return small
    as_siglip: dict[str, Any] = {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    vision = {"timm_model_name": "vit_small_patch16_224", "timm_pool": "avg", "timm_proj": "none"}
    model: nn.Module = open_clip.CustomTextCLIP(
        width, vision, {**text, **as_siglip}, output_dict=True, **scalars
    )
    # It builds full-size timm towers only.
    model.get_submodule("visual").trunk = timm.create_model(
        "vit_base_patch16_siglip_224", num_classes=0, img_size=32, **TINY_TRUNK
    )
    return model


def write_weights(setup: Setup) -> None:
    """Initialise open_clip's model and put its weights where `setup` says."""
    torch.manual_seed(0)
    save_file(their_model(setup).state_dict(), setup.weights)


def make_inputs(setup: Setup, batch: int) -> Inputs:
    """Random pictures, and token ids of about the lengths captions have (16 on average)."""
    config = our_config(setup)
    text = config.text_encoder
    generator = torch.Generator().manual_seed(0)
    side = config.image_encoder.image_size or 224
    pixels = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in MEAN_STD[setup.model])
    average, spread = 6 if setup.tiny else 16, 0.4  # log-normal: most are short, a few long
    logs = torch.randn(batch, generator=generator) * spread + math.log(average) - spread**2 / 2
    lengths = logs.exp().round().long().clamp(4, text.context_length)
    ids = torch.randint(2, text.vocab_size - 2, (batch, text.context_length), generator=generator)
    position = torch.arange(text.context_length)
    ids[position >= lengths[:, None]] = text.pad_id
    ids[torch.arange(batch), lengths - 1] = text.eot_id
    return Inputs(
        pixels_BCHW=pixels,
        normalised_BCHW=(pixels / 255 - mean) / std,
        ids_BT=ids,
        lengths_B=lengths,
    )


class ContrastiveStep(TrainingStep):
    """Also clamps the temperature."""

    def __init__(self, setup: Setup, side: Side) -> None:
        torch.set_num_threads(setup.threads)
        self.setup, self.side = setup, side
        work = their_work(setup, side) if side.library == "open_clip" else our_work(setup, side)
        super().__init__(work, setup.device)

    def named_gradients(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Under open_clip's names."""
        if self.side.library == "open_clip":
            return own
        siglip = self.setup.model == "siglip"
        return to_open_clip(own, timm_visual=siglip, custom_text=siglip).state

    def prepare(self) -> None:
        if self.side.compile:
            self.model.compile()

    def after_step(self) -> None:
        ours = self.side.library == "ours"
        with torch.no_grad():
            scale = self.model.get_parameter("head.logit_scale" if ours else "logit_scale")
            scale.clamp_(0, math.log(100))


def their_work(setup: Setup, side: Side) -> Work:
    """open_clip's model and loss."""
    model = their_model(setup)
    model.load_state_dict(load_file(setup.weights))
    model.to(setup.device)
    criterion = ClipLoss() if setup.model == "clip" else SigLipLoss()
    inputs = make_inputs(setup, side.batch)
    pixels, ids = inputs.normalised_BCHW.to(setup.device), inputs.ids_BT.to(setup.device)
    return Work(model, lambda: criterion(**model(pixels, ids)), (pixels, ids))


def our_work(setup: Setup, side: Side) -> Work:
    """Our model and loss."""
    config = our_config(setup)
    model = config.build_model()
    model.chunk_size = side.chunk
    state, unmatched = from_open_clip(load_file(setup.weights))
    assert not unmatched, unmatched
    model.load_state_dict(state)
    model.to(setup.device)
    inputs = make_inputs(setup, side.batch)
    length = inputs.ids_BT.shape[1]
    if side.tokens == "trimmed":  # what `Tokenizer` ships: rounded up to a multiple of 8
        length = min(length, -(-int(inputs.lengths_B.max()) // 8) * 8)
    pixels, ids, mask = (
        x.to(setup.device)
        for x in (inputs.pixels_BCHW, inputs.ids_BT[:, :length], inputs.mask_BT[:, :length])
    )

    def loss() -> Tensor:
        out = model(pixels, ids, mask)
        if config.loss == "info_nce":
            return info_nce(out.image_BE, out.text_BE, out.logit_scale)
        return sigmoid_loss(out.image_BE, out.text_BE, out.logit_scale, out.logit_bias)

    return Work(model, loss, (pixels, ids, mask))
