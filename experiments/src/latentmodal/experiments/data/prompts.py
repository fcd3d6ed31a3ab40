"""Samples to a language model's prompts, in the loader's workers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.errors import UserError
from latentmodal.llm import PromptWriter

TARGETS = ("caption", "answer")


@dataclass(frozen=True)
class WritePrompts:
    """Fills the fields of a prompt from each sample; picklable, as workers may be spawned.

    For `caption` the answer is the caption drawn for this visit. For `answer` one of the sample's
    questions is drawn, and of several people's answers one of those.
    """

    writer: PromptWriter
    target: str

    def __call__(self, samples: Sequence[Sample]) -> Any:
        fields = [prompt_fields(sample, self.target) for sample in samples]
        return self.writer.train(fields, [sample.draw for sample in samples])


def prompt_fields(sample: Sample, target: str) -> dict[str, str]:
    """What a sample gives a prompt: `answer`, and for questions `question`.

    Raises:
        UserError: no question in the sample's json, where one is wanted.
    """
    if target == "caption":
        return {"answer": sample.caption}
    questions = sample.meta.get("questions")
    if not questions:
        raise UserError(
            f"sample {sample.key} has no questions in its json; system.target=answer needs them"
        )
    rng = random.Random(sample.draw)
    chosen = rng.choice(questions)
    answer = rng.choice(chosen["answers"]) if chosen.get("answers") else chosen["answer"]
    return {"question": chosen["question"], "answer": answer}
