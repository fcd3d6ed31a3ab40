"""What every language model that reads soft tokens can do.

Shapes: B samples, T positions, E embedding width, K pictures in the batch, M soft tokens of one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import StoppingCriteria, StoppingCriteriaList

from latentmodal.llm.batch import PromptBatch, Seq2SeqBatch
from latentmodal.llm.config import LanguageModelConfig
from latentmodal.llm.generation import EndText, GenerationSettings, answer_text, steady_text
from latentmodal.llm.loading import (
    Kind,
    add_lora,
    build_model,
    find_source,
    load_tokenizer,
    read_config,
)
from latentmodal.llm.splice import splice_soft_tokens
from latentmodal.llm.streaming import stream_ids


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
        stop_ids = self._stop_ids(batch.end)
        ids_BT = self._generate_ids(batch, soft_tokens, settings, stop_ids, ())
        start, tokenizer = self._num_start_ids, self.tokenizer
        return [answer_text(row[start:], stop_ids, batch.end, tokenizer) for row in ids_BT.tolist()]

    def stream(
        self,
        batch: Any,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        settings: GenerationSettings,
    ) -> Iterator[str]:
        """What the model says to one prompt, piece by piece while it is said.

        The pieces together are what `generate` returns; nothing of an end text is ever among
        them. Closing the iterator stops the model at its next token.

        Args:
            batch: from `PromptWriter.ask`, of one prompt.
            soft_tokens: as in `forward`.
            settings: how the answer is searched for, without beams.

        Raises:
            ValueError: several prompts, several beams, or sharded weights.
        """
        self._check_askable(batch)
        if len(batch.ids_BT) != 1:
            raise ValueError(f"{len(batch.ids_BT)} prompts cannot be streamed: give one at a time")
        if settings.num_beams != 1:
            raise ValueError(
                f"num_beams={settings.num_beams}: beams change their mind about what was said; "
                "stream with num_beams=1"
            )
        if self._is_sharded():
            raise ValueError("sharded weights cannot be streamed from: use generate")
        return self._pieces(batch, soft_tokens, settings)

    def _pieces(self, batch: Any, soft_tokens: Any, settings: GenerationSettings) -> Iterator[str]:
        stop_ids = self._stop_ids(batch.end)

        @torch.no_grad()
        def run(tap: StoppingCriteria) -> Tensor:
            return self._generate_ids(batch, soft_tokens, settings, stop_ids, (tap,))

        shown = ""
        with closing(stream_ids(run, batch.ids_BT.device)) as steps:
            for ids, is_last in steps:
                to_text = answer_text if is_last else steady_text
                said = to_text(ids[self._num_start_ids :], stop_ids, batch.end, self.tokenizer)
                if len(said) > len(shown):
                    yield said[len(shown) :]
                    shown = said

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

    def _generate_ids(
        self,
        batch: Any,
        soft_tokens: Tensor | Sequence[Tensor] | None,
        settings: GenerationSettings,
        stop_ids: Sequence[int],
        criteria: Sequence[StoppingCriteria],
    ) -> Tensor:
        ends = [EndText(batch.end, self.tokenizer)] if self._ends_in_pieces(batch.end) else []
        ids_BT: Tensor = self.model.generate(
            inputs_embeds=self.embed(batch, soft_tokens),
            attention_mask=batch.mask_BT.long(),
            generation_config=settings.for_transformers(stop_ids, padding_id(self.tokenizer)),
            logits_processor=settings.logits_processors(),
            stopping_criteria=StoppingCriteriaList([*ends, *criteria]),
            # Sharded weights are gathered by all ranks at once: who has finished goes on for show.
            synced_gpus=self._is_sharded(),
        )
        return ids_BT

    def _is_sharded(self) -> bool:
        return any(isinstance(p, DTensor) for p in self.parameters())

    def _stop_ids(self, end: str | None) -> list[int]:
        """The ids that end an answer; an end text is among them if it is one token."""
        eos = self.tokenizer.eos_token_id
        end_ids = self._end_ids(end)
        return [*(end_ids if len(end_ids) == 1 else ()), *(() if eos is None else (int(eos),))]

    def _ends_in_pieces(self, end: str | None) -> bool:
        """Whether an end text is several tokens, alone, behind a word or behind a space.

        Llama's `###` is one token at the start of a text and two behind a word.
        """
        if end is None:
            return False
        end_ids = self._end_ids(end)
        behind = (self._end_ids(before + end)[-1:] for before in ("x", "x "))
        return len(end_ids) != 1 or any(ids != end_ids for ids in behind)

    def _end_ids(self, end: str | None) -> list[int]:
        if end is None:
            return []
        ids: list[int] = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        return ids


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
