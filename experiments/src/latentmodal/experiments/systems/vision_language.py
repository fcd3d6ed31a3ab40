"""An image encoder, a bridge and a language model: what BLIP-2's second stage and its kin train.

Legend: B pictures, N feature tokens, D encoder width, M soft tokens, E embedding width of the LLM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentmodal.bridges import Bridge
from latentmodal.encoders import ImageEncoder
from latentmodal.experiments.systems.base import shared_count
from latentmodal.experiments.training.freeze import is_frozen
from latentmodal.llm import GenerationSettings, LanguageModel


class VisionLanguageModel(nn.Module):
    """`forward` gives the training loss; `generate` answers."""

    fsdp_forward_methods = ("generate",)

    def __init__(self, image_encoder: ImageEncoder, bridge: Bridge, llm: LanguageModel) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.llm = llm

    @property
    def fsdp_units(self) -> tuple[type[nn.Module], ...]:
        """Module classes sharded and recomputed as one piece."""
        return (*self.image_encoder.fsdp_units, *self.bridge.fsdp_units, *self.llm.fsdp_units)

    @property
    def fsdp_parts(self) -> tuple[nn.Module, ...]:
        """Each part apart: one is frozen and another trains, in other dtypes."""
        return (self.image_encoder, self.bridge, self.llm)

    @property
    def fp32_modules(self) -> tuple[nn.Module, ...]:
        """The norm over the features, as in BLIP-2."""
        norm = getattr(self.bridge, "input_norm", None)
        return () if norm is None else (norm,)

    def forward(self, pixels_BCHW: Tensor, prompts: Any) -> Tensor:
        """Mean cross-entropy over the answer tokens of all ranks.

        Args:
            pixels_BCHW: pictures in the order of the prompts' image slots.
            prompts: a batch of the language model's prompt writer.
        """
        soft_BME = self.read(pixels_BCHW)
        shared = shared_count(prompts.num_targets, soft_BME.device)
        loss: Tensor = self.llm(prompts, soft_BME, denominator=shared)
        return loss

    def generate(
        self, pixels_BCHW: Tensor, prompts: Any, settings: GenerationSettings
    ) -> list[str]:
        """The language model's answer to each prompt."""
        return self.llm.generate(prompts, self.read(pixels_BCHW), settings)

    def read(self, pixels_BCHW: Tensor) -> Tensor:
        """Soft tokens (B, M, E); whatever is frozen runs without autograd."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.image_encoder)):
            features = self.image_encoder(pixels_BCHW)
        soft_BME: Tensor = self.bridge(features.tokens_BND, features.mask_BN)
        return soft_BME
