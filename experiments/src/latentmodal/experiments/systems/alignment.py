"""Vision-language alignment of a Q-Former: the first stage of BLIP-2.

Legend: B pairs, M queries, E embedding width, N feature tokens, C H W pixels, T text length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentmodal.bridges import AlignmentHeadConfig
from latentmodal.encoders import TOKENIZERS, Tokenizer
from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.seeding import derive_seed
from latentmodal.experiments.systems.alignment_model import AlignmentModel, ObjectiveWeights
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES, IMAGE_TOWERS
from latentmodal.experiments.systems.pretrained import PretrainedConfig
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """An image tower, a Q-Former that reads it, and up to three objectives."""

    image_encoder: Any = choice(IMAGE_TOWERS)
    bridge: Any = choice({"qformer": BRIDGE_CHOICES["qformer"]})
    tokenizer: Any = choice(TOKENIZERS)
    vocab_limit: int = 1024
    """Most words of the vocabulary when the tokenizer's path is `auto`."""
    embed_dim: int = 256
    init_temperature: float = 0.07
    objectives: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    pretrained: PretrainedConfig | None = None

    def build_model(self, vocab_size: int) -> AlignmentModel:
        """Tower, Q-Former and heads; an objective that is off has no parameters.

        Args:
            vocab_size: of the tokenizer; the Q-Former adds one id of its own.
        """
        on = self.objectives
        encoder = self.image_encoder.build()
        bridge_config = self.bridge.complete(
            in_dim=encoder.width, out_dim=None, vocab_size=vocab_size + 1
        )
        bridge_config = replace(bridge_config, captioning=on.itg > 0)
        head = AlignmentHeadConfig(
            width=bridge_config.width,
            embed_dim=self.embed_dim,
            init_temperature=self.init_temperature,
            contrastive=on.itc > 0,
            matching=on.itm > 0,
        ).build()
        model = AlignmentModel(encoder, bridge_config.build(), head, on)
        if self.pretrained is not None:
            self.pretrained.load_into(model)
        return model

    def build(
        self,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: Tokenizer | None = None,
    ) -> AlignmentSystem:
        """The LightningModule that trains this model.

        Raises:
            ValueError: texts do not begin with a special token.
        """
        assert tokenizer is not None
        _check_first_token(tokenizer)
        return AlignmentSystem(
            self, self.build_model(tokenizer.vocab_size), plan, optim, trainer, tokenizer
        )


class AlignmentSystem(System):
    """Trains an `AlignmentModel`.

    Source: BLIP-2 (Li et al. 2023, arXiv 2301.12597), section 3.1.
    """

    reads_pooled: ClassVar[bool] = False
    model: AlignmentModel
    tokenizer: Tokenizer

    def __init__(
        self,
        config: AlignmentConfig,
        model: AlignmentModel,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(model, plan, optim, trainer)
        self.config = config
        self.tokenizer = tokenizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; the mean over ranks of the returned loss is the full-batch loss."""
        losses = self.model(
            batch.pixels_BCHW,
            batch.text.ids_BT,
            batch.text.mask_BT,
            batch.image_ids_B,
            batch.num_text_tokens - len(batch),
            derive_seed(self.seed, "negatives", self.global_step),
            self.cached_features(batch),
        )
        self.check_finite(losses.total.detach(), batch.keys)
        if self.should_log:
            means = {name: self.mean_over_ranks(value) for name, value in losses.parts.items()}
            self.record(losses.total, **means)
        return losses.total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.model.head.clamp_temperature_()

    @torch.no_grad()
    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised embeddings (B, M, E), one per query, in fp32."""
        image_BME = self.read_images(pixels_BCHW)[1]
        assert image_BME is not None
        return image_BME

    @torch.no_grad()
    def read_images(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, N, D) for `match_scores`, and embeddings (B, M, E) for retrieval.

        No embeddings where the contrastive objective is off.
        """
        with self.compute_precision():
            features_BND, image_BME = self.model.encode_image(pixels_BCHW)
        return features_BND, None if image_BME is None else image_BME.float()

    @torch.no_grad()
    def embed_captions(self, captions: list[str], batch_size: int = 512) -> Tensor:
        """Normalised caption embeddings (M, E), on the CPU."""
        parts = []
        for start in range(0, len(captions), batch_size):
            ids_BT, mask_BT = self._tokens(captions[start : start + batch_size])
            with self.compute_precision():
                parts.append(self.model.encode_text(ids_BT, mask_BT).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def match_scores(self, features_RND: Tensor, captions: list[str]) -> Tensor:
        """ITM logits (R,) of caption i with the features of picture i, on the CPU."""
        ids_BT, mask_BT = self._tokens(captions)
        with self.compute_precision():
            scores_R = self.model.match(features_RND.to(self.device), ids_BT, mask_BT)
        return scores_R.float().cpu()

    @torch.no_grad()
    def caption_scores(self, features_RND: Tensor, captions: list[str]) -> Tensor:
        """Log-likelihoods (R,) of caption i given picture i under the captioning objective."""
        ids_BT, mask_BT = self._tokens(captions)
        with self.compute_precision():
            scores_R = self.model.likelihood(features_RND.to(self.device), ids_BT, mask_BT)
        return scores_R.float().cpu()

    @torch.no_grad()
    def caption_images(self, pixels_BCHW: Tensor) -> list[str]:
        """What the Q-Former says of each picture, greedily."""
        end_id, length = self.tokenizer.eot_id, self.tokenizer.context_length
        assert end_id is not None, "a caption needs an end"
        with self.compute_precision():
            ids_BT = self.model.caption(pixels_BCHW, end_id, length)
        return self.tokenizer.decode(ids_BT.tolist())

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = self.tokenizer(self.read_as_in_training(captions))
        return ids_BT.to(self.device), mask_BT.to(self.device)


def _check_first_token(tokenizer: Tokenizer) -> None:
    """The first token stands for the whole text, and captioning begins in its place."""
    ids_BT, mask_BT = tokenizer(["", "a"])
    if not mask_BT[0, 0] or ids_BT[0, 0] != ids_BT[1, 0]:
        raise ValueError(
            "system.tokenizer: texts begin with a word, and the Q-Former needs a special token "
            "there, such as [CLS]; name a tokenizer of BERT's kind, or name: word"
        )
