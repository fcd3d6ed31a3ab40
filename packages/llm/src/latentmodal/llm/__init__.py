"""Language models that read soft tokens: prompts with image slots, splicing, answer-only loss."""

from latentmodal.llm.answers import IGNORE_INDEX, answer_labels, answer_loss
from latentmodal.llm.prompt import (
    IMAGE,
    IMAGE_SLOT,
    Answer,
    ExpandedIds,
    Prompt,
    PromptBatch,
    PromptIds,
    collate_prompts,
    expand_slots,
)
from latentmodal.llm.splice import splice_soft_tokens

__all__ = [
    "IGNORE_INDEX",
    "IMAGE",
    "IMAGE_SLOT",
    "Answer",
    "ExpandedIds",
    "Prompt",
    "PromptBatch",
    "PromptIds",
    "answer_labels",
    "answer_loss",
    "collate_prompts",
    "expand_slots",
    "splice_soft_tokens",
]
