"""Speaking of pictures through a language model: BLIP-2's second stage, MiniGPT-4, LLaVA.

Legend: B prompts, K pictures, M soft tokens, E embedding width of the LLM, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.prompts import (
    TARGET_FIELDS,
    TARGETS,
    WriteConversations,
    WritePrompts,
)
from latentmodal.experiments.data.text_cleaning import clean_question
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES, IMAGE_TOWERS
from latentmodal.experiments.systems.pretrained import PretrainedConfig
from latentmodal.experiments.systems.projection import ProjectionConfig
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig, check_choice
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import (
    CONVERSATION_STYLES,
    IMAGE_TAG,
    LANGUAGE_MODELS,
    Conversation,
    ConversationTemplate,
    ConversationWriter,
    GenerationSettings,
    LanguageModel,
    PromptBatch,
    PromptTemplate,
    PromptWriter,
    Seq2SeqBatch,
    Turn,
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """An image tower, a bridge into a language model, and what they meet in."""

    image_encoder: Any = choice(IMAGE_TOWERS)
    bridge: Any = choice(BRIDGE_CHOICES)
    llm: Any = choice(LANGUAGE_MODELS)
    prompt: PromptTemplate = field(default_factory=PromptTemplate)
    conversation: ConversationTemplate | None = None
    """Takes the place of `prompt` where given: turns of a user and an assistant."""
    target: str = "caption"
    """What is to be said: the `caption` drawn for a visit, the `description` in a sample's json,
    the `answer` to a question drawn, the `answers` to all of its questions in one conversation, or
    all answers of the sample's `conversation`."""
    pretrained: PretrainedConfig | None = None
    projection: ProjectionConfig | None = None
    """Weights of the last part of the bridge, laid over `pretrained`."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How captions for TensorBoard and evaluation are made, unless a task says otherwise."""

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)
        if self.conversation is not None:
            self._check_questions_are_asked(self.conversation.style)
            return
        if self.target not in TARGET_FIELDS:
            raise ValueError(f"target={self.target} needs system.conversation, e.g. vicuna_v0")
        given = TARGET_FIELDS[self.target]
        if unfilled := [name for name in self.prompt.fields if name not in given]:
            raise ValueError(
                f"prompt.text has the field {{{unfilled[0]}}}, which target={self.target} does not "
                f"fill (it fills {', '.join(('answer', *given))}); correct one of the two"
            )

    def _check_questions_are_asked(self, style: str) -> None:
        known = CONVERSATION_STYLES.get(style)
        if known is not None and known.speechless and self.target in ("answer", "answers"):
            raise ValueError(
                f"target={self.target} asks questions and conversation.style={style} leaves out "
                "what the user says; choose another style"
            )

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
        if self.projection is not None:
            self.projection.load_into(bridge)
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

    Sources: BLIP-2 (Li et al. 2023, arXiv 2301.12597), section 3.2; MiniGPT-4 (Zhu et al. 2023,
    arXiv 2304.10592).
    """

    reads_pooled: ClassVar[bool] = False
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
        if config.llm.quantization != "none" and trainer.parallelism == "fsdp":
            raise ValueError(
                f"system.llm.quantization={config.llm.quantization} cannot be sharded: set "
                "trainer.parallelism=ddp or single"
            )
        if config.llm.lora is not None and not _has_adapters_in_training(model):
            raise ValueError(
                "freeze: the adapters of system.llm.lora are frozen with the language model; put "
                "'*lora_*: 1.0' before the pattern that freezes it"
            )
        self.config = config
        self.writer: PromptWriter | ConversationWriter
        if config.conversation is None:
            self.writer = self.write_prompts(config.prompt)
        else:
            self.writer = self.write_conversations(config.conversation)

    def write_prompts(self, template: PromptTemplate) -> PromptWriter:
        """A writer of prompts for this model's pictures."""
        llm = self.model.llm
        return PromptWriter(
            template, llm.tokenizer, llm.kind, num_image_tokens=self.model.bridge.num_output_tokens
        )

    def write_conversations(self, template: ConversationTemplate) -> ConversationWriter:
        """The same for conversations."""
        llm = self.model.llm
        return ConversationWriter(
            template, llm.tokenizer, llm.kind, num_image_tokens=self.model.bridge.num_output_tokens
        )

    @property
    def prompt_transform(self) -> WritePrompts | WriteConversations:
        if isinstance(self.writer, ConversationWriter):
            return WriteConversations(self.writer, self.config.target)
        return WritePrompts(self.writer, self.config.target)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; the mean over ranks of the returned loss is the full-batch loss."""
        features_BND = self.cached_features(batch)
        loss: Tensor = self.model(batch.pixels_BCHW, batch.prompts, features_BND)
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
        """What the model says to each picture, asked by a prompt.

        Args:
            pixels_BCHW: pictures, one per prompt.
            fields: fills the prompt's fields, such as `question`.
            prompt: another one than the recipe's training prompt.
            settings: other ones than the recipe's.
        """
        writer = self.write_prompts(prompt or self.config.prompt)
        if self.clean == "blip":
            fields = [_with_clean_question(filled) for filled in fields]
        return self._generate(pixels_BCHW, writer.ask(fields), settings)

    @torch.no_grad()
    def converse(
        self,
        pixels_KCHW: Tensor,
        conversations: Sequence[Conversation],
        settings: GenerationSettings | None = None,
    ) -> list[str]:
        """What the assistant says next in each conversation.

        Args:
            pixels_KCHW: a picture for every `<image>` of the users, in reading order.
            conversations: each ends with the user's turn.
            settings: other ones than the recipe's.

        Raises:
            ValueError: the system has no conversation; pictures and tags differ in number; a
                conversation that the style cannot write, or that is too long.
        """
        return self._generate(pixels_KCHW, self._open(pixels_KCHW, conversations), settings)

    def stream(
        self,
        pixels_KCHW: Tensor,
        conversation: Conversation,
        settings: GenerationSettings | None = None,
    ) -> Iterator[str]:
        """The same of one conversation, piece by piece while it is said.

        Raises:
            ValueError: as in `converse`, and for beams.
        """
        prompts = self._open(pixels_KCHW, [conversation]).to(self.device)
        with torch.no_grad(), self.compute_precision():
            soft_KME = self.model.read(pixels_KCHW.to(self.device)) if len(pixels_KCHW) else None
            pieces = self.model.llm.stream(prompts, soft_KME, settings or self.config.generation)
        return self._in_precision(pieces)

    def _in_precision(self, pieces: Iterator[str]) -> Iterator[str]:
        """The model's thread takes over this one's autocast at the first piece, and keeps it."""
        with self.compute_precision():
            first = next(pieces, "")
        yield first
        yield from pieces

    def _open(self, pixels_KCHW: Tensor, conversations: Sequence[Conversation]) -> PromptBatch:
        if not isinstance(self.writer, ConversationWriter):
            raise ValueError("this system fills a prompt: give the recipe system.conversation")
        batch = self.writer.ask(conversations)
        if sum(batch.image_counts) != len(pixels_KCHW):
            raise ValueError(
                f"the conversations speak of {sum(batch.image_counts)} pictures, "
                f"{len(pixels_KCHW)} are given: write {IMAGE_TAG} once for each"
            )
        return batch

    def _generate(
        self,
        pixels_KCHW: Tensor,
        prompts: PromptBatch | Seq2SeqBatch,
        settings: GenerationSettings | None,
    ) -> list[str]:
        with self.compute_precision():
            return self.model.generate(
                pixels_KCHW.to(self.device),
                prompts.to(self.device),
                settings or self.config.generation,
            )

    def caption_images(
        self, pixels_BCHW: Tensor, settings: GenerationSettings | None = None
    ) -> list[str]:
        """What the model says of each picture, asked as the recipe trains it."""
        count = len(pixels_BCHW)
        if isinstance(self.writer, ConversationWriter):
            return self.converse(pixels_BCHW, [[Turn("user", IMAGE_TAG)]] * count, settings)
        return self.answer(pixels_BCHW, [{}] * count, settings=settings)


def _with_clean_question(fields: Mapping[str, str]) -> dict[str, str]:
    return {
        name: clean_question(text) if name == "question" else text for name, text in fields.items()
    }


def _has_adapters_in_training(model: VisionLanguageModel) -> bool:
    return any("lora_" in name and p.requires_grad for name, p in model.llm.named_parameters())
