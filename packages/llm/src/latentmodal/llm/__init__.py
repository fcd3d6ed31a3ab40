"""Language models that read soft tokens: prompts, splicing, answer-only loss, generation."""

from latentmodal.llm.answers import IGNORE_INDEX, answer_labels, answer_loss, target_loss
from latentmodal.llm.batch import PromptBatch, Seq2SeqBatch
from latentmodal.llm.causal import CausalConfig, CausalLM
from latentmodal.llm.config import LanguageModelConfig, LoraConfig
from latentmodal.llm.generation import GenerationSettings
from latentmodal.llm.gguf import cached_gguf
from latentmodal.llm.language_model import LanguageModel
from latentmodal.llm.prompt import (
    IMAGE,
    IMAGE_SLOT,
    Answer,
    ExpandedIds,
    Prompt,
    PromptIds,
    collate_prompts,
    expand_slots,
)
from latentmodal.llm.seq2seq import Seq2SeqConfig, Seq2SeqLM
from latentmodal.llm.splice import splice_soft_tokens
from latentmodal.llm.template import PromptTemplate, PromptWriter

LANGUAGE_MODELS: dict[str, type[CausalConfig] | type[Seq2SeqConfig]] = {
    "causal": CausalConfig,
    "seq2seq": Seq2SeqConfig,
}

__all__ = [
    "IGNORE_INDEX",
    "IMAGE",
    "IMAGE_SLOT",
    "LANGUAGE_MODELS",
    "Answer",
    "CausalConfig",
    "CausalLM",
    "ExpandedIds",
    "GenerationSettings",
    "LanguageModel",
    "LanguageModelConfig",
    "LoraConfig",
    "Prompt",
    "PromptBatch",
    "PromptIds",
    "PromptTemplate",
    "PromptWriter",
    "Seq2SeqBatch",
    "Seq2SeqConfig",
    "Seq2SeqLM",
    "answer_labels",
    "answer_loss",
    "cached_gguf",
    "collate_prompts",
    "expand_slots",
    "splice_soft_tokens",
    "target_loss",
]
