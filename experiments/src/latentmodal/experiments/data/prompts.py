"""Samples to a language model's prompts and conversations, in the loader's workers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentmodal.experiments.data.sample import Sample
from latentmodal.experiments.errors import UserError
from latentmodal.llm import IMAGE_TAG, ConversationWriter, PromptWriter, Turn

TARGET_FIELDS: dict[str, tuple[str, ...]] = {
    "caption": (),
    "description": (),
    "answer": ("question",),
}
"""What `{answer}` may be, and the other fields of a prompt that a sample then fills."""

TARGETS = (*TARGET_FIELDS, "answers", "conversation")


@dataclass(frozen=True)
class WritePrompts:
    """Fills the fields of a prompt from each sample; picklable, as workers may be spawned.

    For `caption` the answer is the caption drawn for this visit, for `description` that of the
    sample's json. For `answer` one of its questions is drawn, and of several people's answers one
    of those.
    """

    writer: PromptWriter
    target: str

    def __call__(self, samples: Sequence[Sample]) -> Any:
        fields = [prompt_fields(sample, self.target) for sample in samples]
        return self.writer.train(fields, [sample.draw for sample in samples])


@dataclass(frozen=True)
class WriteConversations:
    """Makes a conversation of each sample; picklable.

    For `conversation` it is the one in the sample's json; a style that takes no words leaves out
    what the user says in it, as LLaVA does. For `answers` all the sample's questions follow one
    another, in an order drawn, as LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) joins those of VQA
    sets. Otherwise the user shows the picture, for `answer` with the question drawn, else with an
    instruction drawn by the writer, and the assistant says what `WritePrompts` would have it say.
    """

    writer: ConversationWriter
    target: str

    def __call__(self, samples: Sequence[Sample]) -> Any:
        conversations = [sample_conversation(sample, self.target) for sample in samples]
        if self.writer.style.speechless:
            conversations = [[_without_words(turn) for turn in said] for said in conversations]
        return self.writer.train(conversations, [sample.draw for sample in samples])


def _without_words(turn: Turn) -> Turn:
    """A user's turn with its pictures alone."""
    if turn.role == "assistant":
        return turn
    return Turn("user", " ".join([IMAGE_TAG] * turn.text.count(IMAGE_TAG)))


def sample_conversation(sample: Sample, target: str) -> list[Turn]:
    """What is said about a sample's picture.

    Raises:
        UserError: the sample lacks what the target needs, or speaks of several pictures.
    """
    if target == "answers":
        return _all_answers(sample)
    if target != "conversation":
        fields = prompt_fields(sample, target)
        asked = f"{IMAGE_TAG} {fields.get('question', '')}".rstrip()
        return [Turn("user", asked), Turn("assistant", fields["answer"])]
    try:
        turns = [Turn(turn["role"], turn["text"]) for turn in sample.meta["conversation"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"sample {sample.key} has no conversation in its json, a list of "
            '{"role": "user" or "assistant", "text": …}; system.target=conversation needs one'
        ) from error
    pictures = sum(turn.text.count(IMAGE_TAG) for turn in turns if turn.role == "user")
    if pictures > 1:
        raise UserError(f"sample {sample.key} speaks of {pictures} pictures; a sample has one")
    return turns


def prompt_fields(sample: Sample, target: str) -> dict[str, str]:
    """What a sample gives a prompt: `answer`, and for questions `question`.

    Raises:
        UserError: the sample has no caption, description, or question with an answer, where one
            is wanted.
    """
    if target == "caption":
        if not sample.captions:
            raise UserError(
                f"sample {sample.key} has no caption; system.target=caption needs one, answer asks "
                "the questions in its json"
            )
        return {"answer": sample.caption}
    if target == "description":
        description = sample.meta.get("description")
        if not isinstance(description, str) or not description.strip():
            raise UserError(
                f"sample {sample.key} has no description in its json; system.target=description "
                "needs one, caption takes its captions"
            )
        return {"answer": description.strip()}
    rng = random.Random(sample.draw)
    question, answer = _drawn_answer(sample, rng.choice(_questions(sample, target)), rng)
    return {"question": question, "answer": answer}


def _all_answers(sample: Sample) -> list[Turn]:
    """Every question with its answer; the first is asked with the picture."""
    rng = random.Random(sample.draw)
    questions = _questions(sample, "answers")
    turns: list[Turn] = []
    for entry in rng.sample(questions, len(questions)):
        question, answer = _drawn_answer(sample, entry, rng)
        asked = question if turns else f"{IMAGE_TAG} {question}"
        turns += [Turn("user", asked), Turn("assistant", answer)]
    return turns


def _questions(sample: Sample, target: str) -> list[Any]:
    questions = sample.meta.get("questions")
    if not isinstance(questions, list) or not questions:
        raise UserError(
            f"sample {sample.key} has no questions in its json; system.target={target} needs them"
        )
    return questions


def _drawn_answer(sample: Sample, entry: Any, rng: random.Random) -> tuple[str, str]:
    """A question, and of several people's answers one."""
    entry = entry if isinstance(entry, dict) else {}
    answer = rng.choice(entry.get("answers") or [entry.get("answer")])
    question = entry.get("question")
    if not (isinstance(question, str) and isinstance(answer, str)):
        raise UserError(
            f"sample {sample.key} has an entry in questions without question, or without answer "
            "and answers; system.target=answer needs both"
        )
    return question, answer
