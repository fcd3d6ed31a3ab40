"""What every language model that reads soft tokens can do.

Shapes: B samples, T positions, E embedding width, K pictures in the batch, M soft tokens of one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import StoppingCriteriaList

from latentmodal.llm.batch import PromptBatch, Seq2SeqBatch
from latentmodal.llm.config import LanguageModelConfig
from latentmodal.llm.generation import EndText, GenerationSettings, answer_text
from latentmodal.llm.loading import (
    Kind,
    add_lora,
    build_model,
    find_source,
    load_tokenizer,
    read_config,
)
from latentmodal.llm.splice import splice_soft_tokens


class LanguageModel(nn.Module):
    """A transformers language model under the attribute `model`.

    Attributes:
        kind: "causal" or "seq2seq", as a `PromptWriter` needs to know.
        width: width of the embeddings, which soft tokens must have.
        fsdp_units: classes of its repeated blocks.
        fsdp_forward_methods: methods besides `forward` that read the weights.
    """

    kind: ClassVar[Kind]
    fsdp_forward_methods: ClassVar[tuple[str, ...]] = ("generate",)

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self._source = find_source(config)
        hf_config = read_config(config, self._source, self.kind)
        self.model = build_model(config, self._source, hf_config, self.kind)
        embeddings = self.model.get_input_embeddings()
        self.width = int(embeddings.embedding_dim)
        self.vocab_size = int(embeddings.num_embeddings)
        blocks = list(_blocks(self.model))
        self.fsdp_units = tuple(dict.fromkeys(type(block) for block in blocks))
        if config.lora is not None:
            add_lora(self.model, config.lora)
        if config.grad_checkpointing:
            for block in blocks:
                _recompute(block)
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, loaded when first asked for.

        Raises:
            ValueError: the model brings none, and the config names none.
        """
        if self._tokenizer is None:
            name = self.config.tokenizer or self._source
            if name is None:
                raise ValueError(
                    "a language model of an inline config has no tokenizer: set tokenizer to a hub "
                    "name or a folder with tokenizer files"
                )
            self._tokenizer = load_tokenizer(name, self.vocab_size)
        return self._tokenizer

    def forward(
        self,
        batch: Any,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        *,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the answer tokens.

        Args:
            batch: from `PromptWriter.train`, for this `kind` of model.
            soft_tokens: ``(K, M, E)``, or one ``(M_i, E)`` per picture, in the order of the
                prompts' image slots; see `splice_soft_tokens` for a batch without pictures.
                None only where nothing precedes the language model.
            denominator: replaces the number of answer tokens as divisor, so that ranks can share
                one; see `target_loss`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        batch: Any,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        settings: GenerationSettings,
    ) -> list[str]:
        """What the model says to each prompt, without the prompt.

        Args:
            batch: from `PromptWriter.ask`.
            soft_tokens: as in `forward`.
            settings: how the answer is searched for.
        """
        self._check_askable(batch)
        tokenizer = self.tokenizer
        stop_ids, criteria = self._stops(batch.end)
        ids_BT = self.model.generate(
            inputs_embeds=self.embed(batch, soft_tokens),
            attention_mask=batch.mask_BT.long(),
            generation_config=settings.for_transformers(stop_ids, padding_id(tokenizer)),
            logits_processor=settings.logits_processors(),
            stopping_criteria=criteria,
            # Sharded weights are gathered by all ranks at once: who has finished goes on for show.
            synced_gpus=any(isinstance(p, DTensor) for p in self.parameters()),
        )
        start = self._num_start_ids
        return [answer_text(row[start:], stop_ids, batch.end, tokenizer) for row in ids_BT.tolist()]

    def embed(
        self, batch: PromptBatch | Seq2SeqBatch, soft_tokens: Tensor | Sequence[Tensor] | None
    ) -> Tensor:
        """The prompts as embeddings ``(B, T, E)``, soft tokens in their slots."""
        return splice_soft_tokens(
            self.model.get_input_embeddings()(batch.ids_BT),
            batch.slot_mask_BT,
            () if soft_tokens is None else soft_tokens,
            slot_counts=batch.slot_counts,
            image_counts=batch.image_counts,
        )

    _num_start_ids: ClassVar[int] = 0
    """Ids that `model.generate` returns ahead of the answer."""

    def _check_askable(self, batch: Any) -> None:
        """Raise ValueError if nothing can be generated from `batch`."""

    def _stops(self, end: str | None) -> tuple[list[int], StoppingCriteriaList | None]:
        """The ids that end an answer, and the criterion for an end text of several tokens."""
        tokenizer = self.tokenizer
        stop_ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        if end is None:
            return stop_ids, None
        end_ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        if len(end_ids) == 1:
            return [*end_ids, *stop_ids], None
        return stop_ids, StoppingCriteriaList([EndText(end, tokenizer)])


def padding_id(tokenizer: Any) -> int:
    """An id to pad with: masked everywhere, so that any id of the vocabulary serves."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks: members of module lists that are in no other module list."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _recompute(block: nn.Module) -> None:
    """Keep of a forward with gradients only its inputs.

    transformers' own switch works in training mode alone, and a frozen model is not in it.
    """
    block.forward = partial(_checkpointed, block.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
