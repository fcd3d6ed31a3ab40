"""Asking a system about pictures, by its prompt or in a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from latentmodal.experiments.data.loader import gather_objects
from latentmodal.experiments.data.text_cleaning import clean_question
from latentmodal.experiments.errors import UserError
from latentmodal.llm import IMAGE_TAG, GenerationSettings, PromptTemplate, Turn


def converses(system: Any) -> bool:
    """Whether the system holds conversations, rather than filling a prompt."""
    return getattr(system.config, "conversation", None) is not None


def check_answers(system: Any, prompt: PromptTemplate | None) -> None:
    """Raise `UserError` unless the system can be asked questions, by `prompt` or its own."""
    if not hasattr(system, "answer"):
        raise UserError("questions need a system with a language model: generation")
    _check_prompt(system, prompt, ("question",))


def check_describes(
    system: Any, prompt: PromptTemplate | None, settings: GenerationSettings | None
) -> None:
    """Raise `UserError` unless the system can say what it sees, as it is told to."""
    if not hasattr(system, "caption_images"):
        raise UserError("captions need a system that says something: generation, or alignment")
    bridge = getattr(system.model, "bridge", None)
    if not hasattr(system, "answer") and getattr(bridge, "caption_head", None) is None:
        raise UserError("captions need the captioning objective: set system.objectives.itg")
    if not hasattr(system, "answer") and (prompt or settings):
        raise UserError("prompt and generation are for a system with a language model")
    if hasattr(system, "answer"):
        _check_prompt(system, prompt, ())


def describe(
    system: Any,
    pixels_BCHW: Tensor,
    *,
    instruction: str | None = None,
    prompt: PromptTemplate | None = None,
    settings: GenerationSettings | None = None,
) -> list[str]:
    """What the system says of each picture.

    Args:
        system: one that `check_describes` lets pass.
        pixels_BCHW: the pictures.
        instruction: what a system that converses is told; None is its own instruction.
        prompt, settings: other ones than the system's.
    """
    if not hasattr(system, "answer"):
        return list(system.caption_images(pixels_BCHW.to(system.device)))
    told = [instruction or ""] * len(pixels_BCHW)
    return _say(system, pixels_BCHW, told, [{} for _ in told], prompt, settings)


def ask(
    system: Any,
    pixels_BCHW: Tensor,
    asked: Sequence[tuple[int, str]],
    *,
    prompt: PromptTemplate | None = None,
    settings: GenerationSettings | None = None,
) -> list[str]:
    """The system's answers to (row of the picture, question) pairs; a collective operation.

    It goes in turns of the batch's size. Ranks ask equally often, the first question again where
    one runs out: sharded weights are gathered by all or by none.

    Args:
        system: one that `check_answers` lets pass.
        pixels_BCHW: the pictures.
        asked: the questions of this rank.
        prompt, settings: other ones than the system's.
    """
    size = len(pixels_BCHW)
    turns = max(gather_objects(-(-len(asked) // size)))
    said: list[str] = []
    for turn in range(turns):
        part = asked[turn * size : (turn + 1) * size]
        rows, questions = zip(*(part or [(0, "")]), strict=True)
        fields = [{"question": question} for question in questions]
        answers = _say(system, pixels_BCHW[list(rows)], questions, fields, prompt, settings)
        said += answers[: len(part)]
    return said


def _say(
    system: Any,
    pixels_BCHW: Tensor,
    texts: Sequence[str],
    fields: Sequence[Mapping[str, str]],
    prompt: PromptTemplate | None,
    settings: GenerationSettings | None,
) -> list[str]:
    """Turns of a conversation, or the fields of a prompt, to what the system says then."""
    if not converses(system):
        return list(system.answer(pixels_BCHW, fields, prompt=prompt, settings=settings))
    if getattr(system, "clean", "none") == "blip":
        texts = [clean_question(text) for text in texts]
    # Where a turn has no words, the conversation's own instruction is said.
    turns = [[Turn("user", f"{IMAGE_TAG} {text}".rstrip())] for text in texts]
    return list(system.converse(pixels_BCHW, turns, settings or system.config.generation))


def _check_prompt(system: Any, prompt: PromptTemplate | None, given: tuple[str, ...]) -> None:
    """Refuse a prompt with other fields than those the task fills."""
    if converses(system):
        if prompt is not None:
            raise UserError("prompt is for a system with one; this one has system.conversation")
        return
    used: PromptTemplate = prompt or system.config.prompt
    if set(used.fields) != set(given):
        wanted, filled = (", ".join(names) or "none" for names in (used.fields, given))
        raise UserError(
            f"the prompt {used.text!r} has the fields {wanted}, this task fills {filled}; "
            "give the task a prompt of its own"
        )
