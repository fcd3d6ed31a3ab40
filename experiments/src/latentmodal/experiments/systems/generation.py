"""Saying what is in a picture, through a language model: BLIP-2's second stage and fine-tunings.

Legend: B pictures, M soft tokens, E embedding width of the LLM, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.prompts import TARGETS, WritePrompts
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES, IMAGE_TOWERS
from latentmodal.experiments.systems.pretrained import PretrainedConfig
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig, check_choice
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import (
    LANGUAGE_MODELS,
    GenerationSettings,
    LanguageModel,
    PromptTemplate,
    PromptWriter,
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """An image tower, a bridge into a language model, and the prompt both meet in."""

    image_encoder: Any = choice(IMAGE_TOWERS)
    bridge: Any = choice(BRIDGE_CHOICES)
    llm: Any = choice(LANGUAGE_MODELS)
    prompt: PromptTemplate = field(default_factory=PromptTemplate)
    target: str = "caption"
    """What `{answer}` is: the `caption` drawn for a visit, or the `answer` to a question drawn."""
    pretrained: PretrainedConfig | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How captions for TensorBoard and evaluation are made, unless a task says otherwise."""

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)

    def build_model(self) -> VisionLanguageModel:
        """Tower, bridge and language model; the bridge fits both its neighbours."""
        encoder = self.image_encoder.build()
        llm: LanguageModel = self.llm.build()
        bridge = self.bridge.complete(
            in_dim=encoder.width,
            out_dim=llm.width,
            num_input_tokens=encoder.num_tokens,
            vocab_size=None,
        ).build()
        model = VisionLanguageModel(encoder, bridge, llm)
        if self.pretrained is not None:
            self.pretrained.load_into(model)
        return model

    def build(
        self,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: None = None,
    ) -> GenerationSystem:
        """The LightningModule that trains this model."""
        return GenerationSystem(self, self.build_model(), plan, optim, trainer)


class GenerationSystem(System):
    """Trains a bridge by the language model's own loss on the answer.

    Source: BLIP-2 (Li et al. 2023, arXiv 2301.12597), section 3.2.
    """

    model: VisionLanguageModel

    def __init__(
        self,
        config: GenerationConfig,
        model: VisionLanguageModel,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
    ) -> None:
        super().__init__(model, plan, optim, trainer)
        self.config = config
        self.writer = self.write_prompts(config.prompt)

    def write_prompts(self, template: PromptTemplate) -> PromptWriter:
        """A writer of prompts for this model's pictures."""
        llm = self.model.llm
        return PromptWriter(
            template, llm.tokenizer, llm.kind, num_image_tokens=self.model.bridge.num_output_tokens
        )

    @property
    def prompt_transform(self) -> WritePrompts:
        return WritePrompts(self.writer, self.config.target)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; the mean over ranks of the returned loss is the full-batch loss."""
        loss: Tensor = self.model(batch.pixels_BCHW, batch.prompts)
        self.check_finite(loss.detach(), batch.keys)
        if self.should_log:
            self.record(loss)
        return loss

    @torch.no_grad()
    def answer(
        self,
        pixels_BCHW: Tensor,
        fields: Sequence[Mapping[str, str]],
        *,
        prompt: PromptTemplate | None = None,
        settings: GenerationSettings | None = None,
    ) -> list[str]:
        """What the model says to each picture.

        Args:
            pixels_BCHW: pictures, one per prompt.
            fields: fills the prompt's fields, such as `question`.
            prompt: another one than the recipe's training prompt.
            settings: other ones than the recipe's.
        """
        writer = self.writer if prompt is None else self.write_prompts(prompt)
        prompts = writer.ask(fields).to(self.device)
        with self.compute_precision():
            return self.model.generate(
                pixels_BCHW.to(self.device), prompts, settings or self.config.generation
            )

    def caption_images(self, pixels_BCHW: Tensor) -> list[str]:
        """What the model says of each picture, asked as the recipe trains it."""
        return self.answer(pixels_BCHW, [{}] * len(pixels_BCHW))
