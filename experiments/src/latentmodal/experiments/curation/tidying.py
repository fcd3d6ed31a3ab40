"""Mending without a model: what of a description's form needs no understanding of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from latentmodal.experiments.curation.refining import Outcome, Refusal
from latentmodal.experiments.curation.rules import (
    broken_sentences,
    sentences,
    without_nonsense,
    words,
)


class TidyRefiner:
    """Mends texts by `tidy`; one of which nothing is left is refused."""

    name = "tidy"

    def refine(self, texts: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        """The outcome for every (id, text), in order."""
        for name, text in texts:
            yield Outcome(name, tidy(text) or Refusal("no whole sentence is in it"))


def tidy(text: str) -> str:
    """The whole sentences of a text, each said once, from a capital to its end mark.

    Remains of prompts and stray characters go, and so does a sentence that breaks off or only says
    an earlier one again. What is but one sentence without a mark gets a full stop: captions are.
    Empty if nothing is left.
    """
    said = sentences(" ".join(without_nonsense(text).split()))
    if len(said) == 1 and broken_sentences(said[0]):
        said = [said[0].rstrip(" ,;:-–—.…") + "."]
    first: dict[tuple[str, ...], str] = {}
    for sentence in said:
        first.setdefault(tuple(words(sentence)), sentence)
    kept = [sentence for sentence in first.values() if not broken_sentences(sentence)]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in kept)
