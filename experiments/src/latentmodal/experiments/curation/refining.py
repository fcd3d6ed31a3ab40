"""Mending generated descriptions: what a language model is asked, and which answers are taken.

Source: MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592), section 3.2, where ChatGPT does this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from latentmodal.experiments.curation.ledger import Ledger, Record, Refined, Refused
from latentmodal.experiments.curation.rules import (
    nonsense_characters,
    repeated_sentences,
    words,
)

INSTRUCTION: Final = (
    "You are given a description of a picture, written by a machine. Rewrite it so that it reads "
    "well: take out whatever is said more than once, drop sentences that break off or make no "
    "sense, take out stray symbols, and correct spelling and grammar. Keep every detail that "
    "remains, say nothing that the description does not say, and do not comment on your work. "
    "Answer with the corrected description alone; if nothing is wrong with it, repeat it unchanged."
)

_DECLINED = re.compile(
    r"(?:i['’]?m sorry|sorry\b|i (?:cannot|can['’]t|am unable|am sorry|apologi[sz]e)|as an ai\b|"
    r"unfortunately, i\b|i['’]?m (?:unable|an ai|not able)|please provide\b)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"\A```\w*\n(.*?)\n?```\Z", re.DOTALL)
_QUOTES = (('"', '"'), ("“", "”"))
MAX_GROWTH: Final = 1.25
"""An answer longer than the text by more than this factor (and a few words) has added something."""
FEW_WORDS: Final = 10
MAX_NEW_WORDS: Final = 0.5
"""An answer of whose different words more than this share is new tells of something else."""


class Refusal(NamedTuple):
    """No usable text came back, and why."""

    reason: str


class Outcome(NamedTuple):
    """What became of the text of one record."""

    id: str
    result: str | Refusal


class Refiner(Protocol):
    """A language model behind an endpoint, or on this machine."""

    name: str
    """Who did it, for the ledger."""

    def refine(self, texts: Sequence[tuple[str, str]]) -> Iterator[Outcome]:
        """The outcome for every (id, text), in any order, each as soon as it is there.

        Raises:
            UserError: it makes no sense to go on.
        """
        ...


@dataclass
class Tally:
    """What a run of `refine_ledger` did, and why it was refused last."""

    refined: int = 0
    refused: int = 0
    reason: str | None = None


def is_due(record: Record) -> bool:
    """Whether a text is to be mended: never yet with success, and no person has decided on it."""
    return record.refined is None and record.review is None and bool(record.text.strip())


def refine_ledger(
    ledger: Ledger,
    refiner: Refiner,
    *,
    limit: int | None = None,
    on_progress: Callable[[Tally, int], None] = lambda _tally, _total: None,
) -> Tally:
    """Mend every text that is due; each outcome is in the ledger before the next is looked at.

    Raises:
        UserError: the refiner cannot go on, or another process writes the ledger.
    """
    tally = Tally()
    with ledger:
        due = [(record.id, record.text) for record in ledger if is_due(record)][:limit]
        texts = dict(due)
        on_progress(tally, len(due))
        for record_id, answer in refiner.refine(due):
            result = check_answer(texts[record_id], answer) if isinstance(answer, str) else answer
            if isinstance(result, Refusal):
                ledger.append(Refused(id=record_id, by=refiner.name, reason=result.reason))
                tally.refused += 1
                tally.reason = result.reason
            else:
                ledger.append(Refined(id=record_id, by=refiner.name, text=result))
                tally.refined += 1
            on_progress(tally, len(due))
    return tally


def check_answer(text: str, answer: str) -> str | Refusal:
    """The answer as a description, or why it is none of `text`."""
    clean = _unwrap(answer)
    said = words(clean)
    if not said:
        return Refusal("the answer is empty")
    if _DECLINED.match(clean) and not _DECLINED.match(text.strip()):
        return Refusal("the model declined to answer")
    given = words(text)
    if len(said) > max(MAX_GROWTH * len(given), len(given) + FEW_WORDS):
        return Refusal(f"the answer has {len(said)} words, the text {len(given)}")
    new = set(said) - set(given)
    if len(new) > MAX_NEW_WORDS * len(set(said)):
        return Refusal(f"{len(new)} of {len(set(said))} different words are not in the text")
    if nonsense_characters(clean) > nonsense_characters(text):
        return Refusal("the answer has characters that make no sense")
    if repeated_sentences(clean) > repeated_sentences(text):
        return Refusal("the answer says sentences again that the text does not")
    return clean


def _unwrap(answer: str) -> str:
    """Without the code fence or the quotes some models put around all they say."""
    clean = answer.strip()
    if fenced := _FENCE.match(clean):
        clean = fenced[1].strip()
    for left, right in _QUOTES:
        inner = clean[1:-1]
        if len(clean) > 1 and clean[0] == left and clean[-1] == right:
            return clean if left in inner or right in inner else inner.strip()
    return clean
