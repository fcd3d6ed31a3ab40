"""Saying an answer: how it is searched for, where it ends, and what of it is text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

_TAIL = 2
"""Tokens looked at beyond the end text's own number, which may be said in other pieces."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is searched for; BLIP-2's settings for captions by default.

    Attributes:
        num_beams: 1 is greedy search, or plain sampling.
        max_new_tokens, min_new_tokens: length of the answer, its end token included.
        do_sample: draw tokens instead of taking the likeliest.
        top_p: sample from the likeliest tokens that together have this probability.
        temperature: divides the logits before sampling.
        length_penalty: exponent of the length that beam scores are divided by: 0 favours short
            answers, more favours long ones.
        repetition_penalty: above 1, divides the logits of tokens already said.
    """

    num_beams: int = 5
    max_new_tokens: int = 30
    min_new_tokens: int = 1
    do_sample: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be between 0 and "
                f"max_new_tokens={self.max_new_tokens}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    def for_transformers(self, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """The same for `transformers`, with every choice made here and none by its defaults."""
        fields: dict[str, Any] = {
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "do_sample": self.do_sample,
            "eos_token_id": list(stop_ids),
            "pad_token_id": pad_id,
        }
        if self.do_sample:
            fields |= {"top_p": self.top_p, "top_k": 0, "temperature": self.temperature}
        if self.num_beams > 1:
            fields["length_penalty"] = self.length_penalty
        return GenerationConfig(**fields)

    def logits_processors(self) -> LogitsProcessorList:
        """The repetition penalty, over the new tokens.

        Not through `GenerationConfig`: there transformers leaves out as many tokens as a row has
        padding, which with `inputs_embeds` are tokens of the answer.
        """
        if self.repetition_penalty == 1:
            return LogitsProcessorList()
        return LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))]
        )


class EndText(StoppingCriteria):
    """Ends each sequence of a batch by itself as soon as it says ``end``.

    For end texts of several tokens; one token is an EOS id like any other.
    """

    def __init__(self, end: str, tokenizer: Any) -> None:
        self.end = end
        self.tokenizer = tokenizer
        self.window = len(tokenizer(end, add_special_tokens=False)["input_ids"]) + _TAIL

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """True for each row of ``input_ids`` whose last tokens hold the end text."""
        tails = self.tokenizer.batch_decode(input_ids[:, -self.window :].tolist())
        ended = [self.end in tail for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


def steady_text(
    ids: Sequence[int], stop_ids: Sequence[int], end: str | None, tokenizer: Any
) -> str:
    """What of an unfinished answer `answer_text` will keep, whatever is said next.

    Held back are outer spaces, a character whose last bytes are yet to come, and text that may
    turn out to begin ``end``.
    """
    stop = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    text: str = tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)
    text = text.rstrip("\ufffd")
    if end and end in text:
        text = text.split(end, 1)[0]
    elif end:
        begun = (n for n in range(len(end) - 1, 0, -1) if text.endswith(end[:n]))
        text = text[: len(text) - next(begun, 0)]
    return text.strip()


def answer_text(
    ids: Sequence[int], stop_ids: Sequence[int], end: str | None, tokenizer: Any
) -> str:
    """Ids of one answer to text: nothing from its end on, no special tokens, no outer spaces."""
    stop = next((index for index, token in enumerate(ids) if token in stop_ids), len(ids))
    text: str = tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)
    return (text.split(end, 1)[0] if end else text).strip()
