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
    cached_parts: int = 0
    """Parts of the bridge that cached features have passed already."""

    def __init__(self, image_encoder: ImageEncoder, bridge: Bridge, llm: LanguageModel) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.bridge = bridge
        self.llm = llm

    @property
    def bridge_parts(self) -> tuple[nn.Module, ...]:
        """The parts of a chain in turn, or the bridge itself."""
        parts = getattr(self.bridge, "parts", None)
        return tuple(parts) if isinstance(parts, nn.ModuleList) else (self.bridge,)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """What pictures pass on their way to soft tokens; what is frozen of it may be cached."""
        return (self.image_encoder, *self.bridge_parts)

    @property
    def fsdp_units(self) -> tuple[type[nn.Module], ...]:
        """Module classes sharded and recomputed as one piece."""
        return (*self.image_encoder.fsdp_units, *self.bridge.fsdp_units, *self.llm.fsdp_units)

    @property
    def fsdp_parts(self) -> tuple[nn.Module, ...]:
        """Each part apart: one is frozen and another trains, in other dtypes."""
        return (*self.stages, self.llm)

    @property
    def fp32_modules(self) -> tuple[nn.Module, ...]:
        """The norm over the features, as in BLIP-2."""
        norms = [getattr(part, "input_norm", None) for part in self.bridge_parts]
        return tuple(norm for norm in norms if norm is not None)

    def forward(
        self, pixels_BCHW: Tensor, prompts: Any, features_BND: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy over the answer tokens of all ranks.

        Args:
            pixels_BCHW: a picture for each prompt; those of prompts without a slot are not read.
            prompts: a batch of the language model's prompt writer.
            features_BND: see `read`.
        """
        shown = [row for row, count in enumerate(prompts.image_counts) if count]
        if len(shown) < len(pixels_BCHW):
            # One picture is read even for none: ranks that have some wait for this rank's part.
            rows = shown or [0]
            pixels_BCHW = pixels_BCHW[rows]
            features_BND = None if features_BND is None else features_BND[rows]
        soft_KME = self.read(pixels_BCHW, features_BND)[: len(shown)]
        shared = shared_count(prompts.num_targets, soft_KME.device)
        loss: Tensor = self.llm(prompts, soft_KME, denominator=shared)
        return loss

    def generate(
        self, pixels_BCHW: Tensor, prompts: Any, settings: GenerationSettings
    ) -> list[str]:
        """The language model's answer to each prompt, which may speak of several pictures or none.

        Args:
            pixels_BCHW: pictures in the order of the prompts' image slots.
            prompts: a batch to be asked.
            settings: how the answer is searched for.
        """
        soft_KME = self.read(pixels_BCHW) if len(pixels_BCHW) else None
        return self.llm.generate(prompts, soft_KME, settings)

    def read(self, pixels_BCHW: Tensor, features_BND: Tensor | None = None) -> Tensor:
        """Soft tokens (B, M, E); whatever is frozen runs without autograd.

        With `features_BND`, the output of the encoder and `cached_parts` parts of the bridge, the
        pictures are not read and the rest of the bridge goes on from there.
        """
        if features_BND is not None:
            if self.cached_parts == 0:
                whole_BME: Tensor = self.bridge(features_BND)
                return whole_BME
            for part in self.bridge_parts[self.cached_parts :]:
                features_BND = part(features_BND)
            assert features_BND is not None
            return features_BND
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(self.image_encoder)):
            features = self.image_encoder(pixels_BCHW)
        soft_BME: Tensor = self.bridge(features.tokens_BND, features.mask_BN)
        return soft_BME
