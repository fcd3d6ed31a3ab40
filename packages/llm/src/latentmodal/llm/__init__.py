"""Language models that read soft tokens: prompts, splicing, answer-only loss, generation."""

from latentmodal.llm.answers import IGNORE_INDEX, answer_labels, answer_loss, target_loss
from latentmodal.llm.batch import PromptBatch, Seq2SeqBatch
from latentmodal.llm.causal import CausalConfig, CausalLM
from latentmodal.llm.config import LanguageModelConfig, LoraConfig
from latentmodal.llm.conversation import (
    CHAT_TEMPLATE,
    CONVERSATION_STYLES,
    DESCRIBE_INSTRUCTIONS,
    IMAGE_TAG,
    Conversation,
    ConversationStyle,
    ConversationTemplate,
    Turn,
    check_conversation,
)
from latentmodal.llm.conversation_writer import ConversationWriter
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
    "CHAT_TEMPLATE",
    "CONVERSATION_STYLES",
    "DESCRIBE_INSTRUCTIONS",
    "IGNORE_INDEX",
    "IMAGE",
    "IMAGE_SLOT",
    "IMAGE_TAG",
    "LANGUAGE_MODELS",
    "Answer",
    "CausalConfig",
    "CausalLM",
    "Conversation",
    "ConversationStyle",
    "ConversationTemplate",
    "ConversationWriter",
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
    "Turn",
    "answer_labels",
    "answer_loss",
    "cached_gguf",
    "check_conversation",
    "collate_prompts",
    "expand_slots",
    "splice_soft_tokens",
    "target_loss",
]
