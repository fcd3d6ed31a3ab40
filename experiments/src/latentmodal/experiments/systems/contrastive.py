"""Contrastive alignment: CLIP (InfoNCE), SigLIP (sigmoid loss) and LiT (a locked image tower).

Legend: B images, M texts, E embedding width, C H W pixels, T text length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentmodal.bridges import ContrastiveHeadConfig
from latentmodal.bridges.losses import info_nce, sigmoid_loss
from latentmodal.encoders import (
    IMAGE_ENCODERS,
    TEXT_ENCODERS,
    TOKENIZERS,
    TextEncoder,
    TextTransformer,
    Tokenizer,
)
from latentmodal.encoders.convert import Activations, load_dual_encoder_weights
from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.dual_encoder import DualEncoder
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig, check_choice
from latentmodal.experiments.training.freeze import FreezePlan


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The contrastive head; the widths it reads come from the towers."""

    embed_dim: int
    image_projection: str = "linear"
    text_projection: str = "linear"
    image_bias: bool = False
    text_bias: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    max_logit_scale: float = math.log(100)


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Pretrained weights for both towers and the head, from one local file or folder."""

    path: str
    format: str
    """openai, open_clip, hf_clip, hf_siglip or latentmodal."""
    activation: str | None = None
    """What both towers were trained with, where the file cannot say so itself."""

    def load_into(self, model: DualEncoder) -> None:
        """Fill towers and head.

        Raises:
            ValueError: another activation, or keys and shapes that do not fit.
        """
        ours = Activations(model.image_encoder.activation, model.text_encoder.activation)
        stated = None if self.activation is None else Activations(self.activation, self.activation)
        try:
            state = load_dual_encoder_weights(
                self.path, self.format, activations=ours, checkpoint_activations=stated
            )
        except ValueError as error:
            # The converter names its own argument; a recipe's author knows it as a key.
            raise ValueError(
                str(error).replace("checkpoint_activations", "system.weights.activation")
            ) from error
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = " ".join(str(error).split()[:40])
            raise ValueError(f"{self.path} does not fit the recipe's towers: {first} …") from error


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Two towers, a head, and a symmetric contrastive loss."""

    image_encoder: Any = choice(IMAGE_ENCODERS)
    text_encoder: Any = choice(TEXT_ENCODERS)
    tokenizer: Any = choice(TOKENIZERS)
    head: HeadConfig
    loss: str = "info_nce"
    label_smoothing: float = 0.0
    chunk_size: int | None = None
    weights: WeightsConfig | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("info_nce", "sigmoid"))
        if self.loss == "sigmoid" and self.head.init_logit_bias is None:
            raise ValueError("head.init_logit_bias is missing; the sigmoid loss starts from -10")
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError("label_smoothing is for info_nce; leave it at 0 with the sigmoid loss")

    @property
    def vocab_limit(self) -> int:
        """Most words a vocabulary learned for this system may have."""
        size: int = self.text_encoder.vocab_size
        return size

    def build_model(self) -> DualEncoder:
        """Both towers and the head, with their pretrained weights where the recipe names some."""
        image_encoder, text_encoder = self.image_encoder.build(), self.text_encoder.build()
        head = ContrastiveHeadConfig(
            image_dim=image_encoder.pooled_width,
            text_dim=text_encoder.pooled_width,
            **vars(self.head),
        ).build()
        model = DualEncoder(image_encoder, text_encoder, head, self.chunk_size)
        if self.weights is not None:
            self.weights.load_into(model)
        return model

    def build(
        self,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: Tokenizer | None = None,
    ) -> ContrastiveSystem:
        """The LightningModule that trains this model; the tokenizer is for evaluation.

        Raises:
            ValueError: the tokenizer's ids do not fit the text tower.
        """
        if self.chunk_size is not None and trainer.parallelism == "fsdp":
            raise ValueError(
                "chunk_size with parallelism 'fsdp' would gather every shard once per chunk; "
                "use ddp, or activation_checkpointing=true"
            )
        model = self.build_model()
        if tokenizer is not None:
            _check_ids_fit(tokenizer, model.text_encoder)
        return ContrastiveSystem(self, model, plan, optim, trainer, tokenizer)


def _check_ids_fit(tokenizer: Tokenizer, text_encoder: TextEncoder) -> None:
    if tokenizer.vocab_size > text_encoder.vocab_size:
        raise ValueError(
            f"text_encoder.vocab_size is {text_encoder.vocab_size} but the tokenizer has "
            f"{tokenizer.vocab_size} tokens; make the first at least the second"
        )
    if tokenizer.context_length > text_encoder.num_tokens:
        raise ValueError(
            f"tokenizer.context_length is {tokenizer.context_length} but the text tower takes "
            f"{text_encoder.num_tokens} tokens; make the first at most the second"
        )
    if isinstance(text_encoder, TextTransformer) and text_encoder.config.pooling == "eot":
        ours, theirs = text_encoder.config.eot_id, tokenizer.eot_id
        if ours != theirs:  # every caption would be read at its first token
            raise ValueError(
                f"text_encoder.eot_id is {ours} but the tokenizer ends texts with {theirs}; "
                "make them equal"
            )


class ContrastiveSystem(System):
    """Trains a `DualEncoder` so that a picture is nearest to its own captions.

    Sources: CLIP (Radford et al. 2021, arXiv 2103.00020) for `info_nce`; SigLIP (Zhai et al. 2023,
    arXiv 2303.15343) for `sigmoid`; LiT (Zhai et al. 2022, arXiv 2111.07991) is either with the
    image tower frozen by the freeze plan.
    """

    model: DualEncoder

    def __init__(
        self,
        config: ContrastiveConfig,
        model: DualEncoder,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(model, plan, optim, trainer)
        self.config = config
        self.tokenizer = tokenizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; the mean over ranks of the returned loss is the full-batch loss."""
        out = self.model(batch.pixels_BCHW, batch.text.ids_BT, batch.text.mask_BT)
        ids: dict[str, Any] = {}
        if batch.text_ids_M is not None:
            ids = {"image_ids_B": batch.image_ids_B, "text_ids_M": batch.text_ids_M}
        if self.config.loss == "info_nce":
            smoothing = self.config.label_smoothing
            loss = info_nce(
                out.image_BE, out.text_BE, out.logit_scale, label_smoothing=smoothing, **ids
            )
        else:
            loss = sigmoid_loss(out.image_BE, out.text_BE, out.logit_scale, out.logit_bias, **ids)
        self.check_finite(loss.detach(), batch.keys)
        if self.should_log:
            head = {"logit_scale": out.logit_scale.detach()}
            if out.logit_bias is not None:
                head["logit_bias"] = out.logit_bias.detach()
            self.record(loss, **head)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.model.head.clamp_temperature_()

    @torch.no_grad()
    def embed_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalised picture embeddings (B, E), in fp32."""
        with self.compute_precision():
            return self.model.encode_image(pixels_BCHW).float()

    @torch.no_grad()
    def embed_captions(self, captions: list[str], batch_size: int = 512) -> Tensor:
        """Normalised caption embeddings (M, E), on the CPU."""
        assert self.tokenizer is not None
        captions, parts = self.read_as_in_training(captions), []
        for start in range(0, len(captions), batch_size):
            ids_MT, mask_MT = self.tokenizer(captions[start : start + batch_size])
            with self.compute_precision():
                text_ME = self.model.encode_text(ids_MT.to(self.device), mask_MT.to(self.device))
            parts.append(text_ME.float().cpu())
        return torch.cat(parts)
