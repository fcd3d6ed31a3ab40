"""A refiner on this machine: a chat model of transformers, asked in batches.

Shapes: B texts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentmodal.experiments.curation.refining import INSTRUCTION, Outcome
from latentmodal.experiments.errors import UserError
from latentmodal.llm import CausalConfig, GenerationSettings
from latentmodal.llm.language_model import padding_id


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Which model, and how it is asked.

    Attributes:
        model: folder, hub name, or GGUF file (also `package:path/in/it.gguf`) of a chat model.
        instruction: the system message; the text to mend is the user's.
        batch_size: texts at a time.
        max_new_tokens: longest answer.
    """

    model: str
    instruction: str = INSTRUCTION
    batch_size: int = 8
    max_new_tokens: int = 400

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def build(self) -> LocalRefiner:
        """Load the model, onto a GPU where there is one.

        Raises:
            UserError: no such model, or one without a chat template.
        """
        on_gpu = torch.cuda.is_available()
        is_gguf = self.model.endswith(".gguf")
        try:
            llm = CausalConfig(
                model=None if is_gguf else self.model,
                gguf=self.model if is_gguf else None,
                dtype="bfloat16" if on_gpu else "float32",
            ).build()
            tokenizer = llm.tokenizer
        except ValueError as error:
            raise UserError(f"--local {self.model}: {error}") from error
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"--local {self.model}: its tokenizer has no chat template; "
                "choose a model that was trained to chat"
            )
        device = "cuda" if on_gpu else "cpu"
        return LocalRefiner(self, llm.model.to(device).eval(), tokenizer)


class LocalRefiner:
    """Mends texts by a causal model of transformers and its tokenizer's chat template."""

    def __init__(self, config: LocalConfig, model: Any, tokenizer: Any) -> None:
        self.config = config
        self.name = Path(config.model).name
        self._model = model
        self._tokenizer = tokenizer

    def refine(self, texts: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        """Outcomes in order, a batch at a time, greedily said."""
        size = self.config.batch_size
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            answers = self._answers([text for _, text in batch])
            yield from (Outcome(name, said) for (name, _), said in zip(batch, answers, strict=True))

    @torch.no_grad()
    def _answers(self, texts: Sequence[str]) -> list[str]:
        prompts = [self._prompt(text) for text in texts]
        pad = padding_id(self._tokenizer)
        longest = max(map(len, prompts))
        # On the left: what is said must follow the prompt without a gap.
        ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        stop_ids = self._stop_ids()
        settings = GenerationSettings(num_beams=1, max_new_tokens=self.config.max_new_tokens)
        said_BT = self._model.generate(
            input_ids=ids_BT.to(self._model.device),
            attention_mask=mask_BT.to(self._model.device),
            generation_config=settings.for_transformers(stop_ids, pad),
        )
        return [
            self._tokenizer.decode(row[longest:], skip_special_tokens=True).strip()
            for row in said_BT.tolist()
        ]

    def _prompt(self, text: str) -> list[int]:
        messages = [
            {"role": "system", "content": self.config.instruction},
            {"role": "user", "content": text},
        ]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def _stop_ids(self) -> list[int]:
        """EOS of the tokenizer, and whatever else the model's own settings end an answer with."""
        ends: Any = self._model.generation_config.eos_token_id
        own = ends if isinstance(ends, list) else [ends]
        known = [self._tokenizer.eos_token_id, *own]
        return list(dict.fromkeys(int(token) for token in known if token is not None))
