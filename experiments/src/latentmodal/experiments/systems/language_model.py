"""A small causal language model of captions, to stand in for a large one while trying things out.

A text begins with the names of a picture's things in any order, some of them repeated, and goes on
with its captions: so it learns to take from what came before what the next caption will speak of. A
model that saw captions alone has no use for a context, and no bridge could tell it anything; soft
tokens only have to take the place of the names. Its run leaves it in `llm/` as a folder that
transformers loads, so that another recipe serves it frozen like any other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from latentmodal.encoders import Tokenizer, WordTokenizer, WordTokenizerConfig
from latentmodal.experiments.choose import choice
from latentmodal.experiments.data.augment import AugmentConfig
from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.systems.base import System, shared_count
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan
from latentmodal.llm import (
    Answer,
    CausalConfig,
    CausalLM,
    Prompt,
    PromptBatch,
    PromptIds,
    collate_prompts,
)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """A Llama of this size over a vocabulary learned from the captions."""

    tokenizer: Any = choice({"word": WordTokenizerConfig})
    vocab_limit: int = 1024
    """Most words of the vocabulary when the tokenizer's path is `auto`."""
    width: int = 256
    layers: int = 4
    heads: int = 4
    mlp_dim: int = 768
    max_text_tokens: int = 32
    """Longest caption."""
    captions_in_a_row: int = 2
    keywords: bool = True
    """Begin with the names of the things, where a sample's json has `objects`."""

    def build(
        self,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: Tokenizer | None = None,
    ) -> LanguageModelSystem:
        """The LightningModule that trains this model."""
        assert isinstance(tokenizer, WordTokenizer)
        llm = CausalConfig(
            config={
                "model_type": "llama",
                "vocab_size": tokenizer.vocab_size,
                "hidden_size": self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.heads,
                "intermediate_size": self.mlp_dim,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": tokenizer.eot_id,
                "pad_token_id": tokenizer.pad_id,
            }
        ).build()
        return LanguageModelSystem(self, TextModel(llm), plan, optim, trainer, tokenizer)


class TextModel(nn.Module):
    """A language model on its own: `forward` gives the loss."""

    fsdp_forward_methods = ()
    fp32_modules = ()

    def __init__(self, llm: CausalLM) -> None:
        super().__init__()
        self.llm = llm

    @property
    def fsdp_units(self) -> tuple[type[nn.Module], ...]:
        """The transformer's blocks."""
        return self.llm.fsdp_units

    def forward(self, prompts: Any) -> Tensor:
        """Mean cross-entropy over the words of all ranks."""
        shared = shared_count(prompts.num_targets, prompts.ids_BT.device)
        loss: Tensor = self.llm(prompts, None, denominator=shared)
        return loss


class LanguageModelSystem(System):
    """Trains a `TextModel` on captions alone."""

    model: TextModel

    def __init__(
        self,
        config: LanguageModelConfig,
        model: TextModel,
        plan: FreezePlan,
        optim: OptimConfig,
        trainer: TrainerConfig,
        tokenizer: WordTokenizer,
    ) -> None:
        super().__init__(model, plan, optim, trainer)
        self.config = config
        self.shared_tokenizer = as_transformers(tokenizer)

    def image_transform(self, augment: AugmentConfig) -> Callable[[Any], Tensor]:
        """Pictures are of no interest here."""
        return no_pixels

    @property
    def prompt_transform(self) -> WriteCaptions:
        config = self.config
        return WriteCaptions(
            self.shared_tokenizer, config.captions_in_a_row, config.max_text_tokens, config.keywords
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step; the mean over ranks of the returned loss is the full-batch loss."""
        loss: Tensor = self.model(batch.prompts)
        self.check_finite(loss.detach(), batch.keys)
        if self.should_log:
            self.record(loss)
        return loss

    def finish(self, folder: Path) -> None:
        """Write `llm/`, which `AutoModelForCausalLM.from_pretrained` loads."""
        prefix = "model.llm.model."
        state = self.trainer.strategy.lightning_module_state_dict()
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if self.trainer.is_global_zero:
            self.model.llm.model.save_pretrained(folder / "llm", state_dict=own)
            self.shared_tokenizer.save_pretrained(folder / "llm")


@dataclass(frozen=True)
class WriteCaptions:
    """Captions of each sample in an order drawn for this visit, each between BOS and EOS.

    With `keywords` the names of its things come first, one to three times each in any order.
    """

    tokenizer: PreTrainedTokenizerFast
    count: int
    max_text_tokens: int
    keywords: bool = False

    def __call__(self, samples: Sequence[Sample]) -> PromptBatch:
        return collate_prompts([self._lay_out(s) for s in samples], self.tokenizer.pad_token_id)

    def _lay_out(self, sample: Sample) -> PromptIds:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rng = random.Random(sample.draw)
        captions = list(sample.captions)
        rng.shuffle(captions)
        parts: list[Any] = [self._names(sample, rng)] if self.keywords else []
        for caption in captions[: self.count]:
            ids = self._encode(caption)[: self.max_text_tokens]
            parts += [(bos,), Answer((*ids, eos))]
        return Prompt(tuple(parts)).lay_out(self._encode, 1)

    def _names(self, sample: Sample, rng: random.Random) -> tuple[int, ...]:
        things = [str(thing["name"]) for thing in sample.meta.get("objects", ())]
        names = things * rng.choice((1, 1, 2, 3))
        rng.shuffle(names)
        return tuple(token for name in names for token in self._encode(name))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def no_pixels(image: Any) -> Tensor:
    """An empty picture."""
    return torch.zeros(3, 0, 0, dtype=torch.uint8)


def as_transformers(tokenizer: WordTokenizer) -> PreTrainedTokenizerFast:
    """The same words and ids behind the interface of transformers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer,
        bos_token="[BOS]",
        eos_token="[EOT]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
