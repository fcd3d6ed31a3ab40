"""POPE: does a model say that things are there which are not? (Li et al. 2023, arXiv 2305.10355)

Half of the questions ask for a thing in the picture, half for one that is not, and how the latter
are chosen makes them harder: at random, among the most frequent things of the set, or among those
most often seen beside the thing asked for.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Final, Literal

from latentmodal.experiments.errors import UserError

Answer = Literal["yes", "no"]
SAMPLINGS: Final = ("random", "popular", "adversarial")

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n")
_YES: Final = frozenset({"yes", "yeah", "yep"})
_NO: Final = frozenset({"no", "nope"})
_DENIAL: Final = re.compile(r"\bthere (?:(?:is|are) not|isn't|aren't)\b")


@dataclass(frozen=True, slots=True)
class Probe:
    """One question: is the thing called ``name`` in the picture?"""

    name: str
    answer: Answer


def pope_probes(
    objects: Sequence[Sequence[str]], sampling: str, *, per_picture: int = 3, seed: int = 0
) -> list[list[Probe]]:
    """For each picture as many questions for things that are there as for things that are not.

    All names that occur in the set can be asked for, so that each is asked for where it is and
    where it is not. The things asked for that are there do not depend on the sampling, nor does
    what is asked of a picture depend on the order of its objects. Of equally frequent names the
    first in the alphabet is taken.

    Args:
        objects: the names of the things in each picture, repeated or not.
        sampling: how things that are not there are chosen: `random`; `popular`, the most frequent
            of the set; `adversarial`, for each thing asked for that is there the one most often
            in the same picture with it, of equals the more frequent.
        per_picture: things asked for that are there, and as many that are not; fewer where the
            picture or the set has fewer.
        seed: of the draws.

    Raises:
        UserError: an unknown sampling, `per_picture` below 1, or nothing to ask for.
    """
    if sampling not in SAMPLINGS:
        raise UserError(f"sampling is '{sampling}'; choose from {', '.join(SAMPLINGS)}")
    if per_picture < 1:
        raise UserError(f"per_picture is {per_picture}; give 1 or more")
    frequency = Counter(name for own in objects for name in set(own))
    beside = Counter(pair for own in objects for pair in permutations(set(own), 2))
    names = sorted(frequency, key=lambda name: (-frequency[name], name))
    asked: list[list[Probe]] = []
    for row, own in enumerate(objects):
        present = sorted(set(own))
        absent = [name for name in names if name not in own]
        count = min(per_picture, len(present), len(absent))
        there = random.Random(f"{seed}/present/{row}").sample(present, count)
        if sampling == "random":
            missing = random.Random(f"{seed}/absent/{row}").sample(absent, count)
        elif sampling == "popular":
            missing = absent[:count]
        else:
            missing = []
            for thing in there:
                # `absent` is in order of frequency, which decides between equals.
                left = [name for name in absent if name not in missing]
                missing.append(max(left, key=lambda name: beside[thing, name]))
        pairs = zip(there, missing, strict=True)
        asked.append([probe for yes, no in pairs for probe in (Probe(yes, "yes"), Probe(no, "no"))])
    if not any(asked):
        raise UserError("no picture has a thing to ask for beside one that is not there")
    return asked


def parse_yes_no(text: str) -> Answer | None:
    """What the first sentence of an answer says; None where it says neither, or both.

    It says yes or no by that word alone; by the one of the two it begins with; or by denying it
    ("There isn't a dog"). A bare statement ("There is a cat") answers another question.
    """
    sentence = _SENTENCE_END.split(text.strip().lower().replace("’", "'"), maxsplit=1)[0]
    words = _WORD.findall(sentence)
    says_yes, says_no = not _YES.isdisjoint(words), not _NO.isdisjoint(words)
    if says_yes and says_no:
        return "yes" if words[0] in _YES else "no" if words[0] in _NO else None
    if says_yes:
        return "yes"
    return "no" if says_no or _DENIAL.search(sentence) else None


def parse_published(text: str) -> Answer:
    """POPE's own rule: no where the first sentence has "No", "no" or "not", else yes.

    An empty answer, "NO" and "I cannot see it" are all yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@dataclass(frozen=True, kw_only=True)
class PopeResult:
    """Counts, and the metrics as they follow; a share of nothing is None.

    Yes is the positive class. An unparsed answer is wrong whatever the question: it counts among
    all answers and misses a thing that is there, but it is no prediction of yes.
    """

    true_yes: int
    """Answered yes where yes is right."""
    false_yes: int
    true_no: int
    false_no: int
    unparsed_yes: int
    """Not parsed where yes is right."""
    unparsed_no: int

    @property
    def total(self) -> int:
        return self.num_positive + self.false_yes + self.true_no + self.unparsed_no

    @property
    def num_positive(self) -> int:
        """Questions whose right answer is yes."""
        return self.true_yes + self.false_no + self.unparsed_yes

    @property
    def num_predicted_yes(self) -> int:
        return self.true_yes + self.false_yes

    @property
    def accuracy(self) -> float:
        return (self.true_yes + self.true_no) / self.total

    @property
    def precision(self) -> float | None:
        """None where nothing was answered yes."""
        return _share(self.true_yes, self.num_predicted_yes)

    @property
    def recall(self) -> float | None:
        """None where nothing asked for is there."""
        return _share(self.true_yes, self.num_positive)

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN): 0 where no yes was right, None where none was said or due."""
        return _share(2 * self.true_yes, self.num_predicted_yes + self.num_positive)

    @property
    def yes_ratio(self) -> float:
        """Answers of yes among all, the unparsed too."""
        return self.num_predicted_yes / self.total

    @property
    def unparsed(self) -> float:
        return (self.unparsed_yes + self.unparsed_no) / self.total


def pope_metrics(predicted: Sequence[Answer | None], labels: Sequence[str]) -> PopeResult:
    """Compare parsed answers with the right ones.

    Raises:
        UserError: the two differ in length, are empty, or a label is neither yes nor no.
    """
    if len(predicted) != len(labels):
        raise UserError(f"{len(predicted)} answers to {len(labels)} questions")
    if not labels:
        raise UserError("no questions were asked: check that the split is not empty")
    if strange := set(labels) - {"yes", "no"}:
        raise UserError(f"the right answer to a POPE question is {min(strange)!r}, not yes or no")
    count = Counter(zip(predicted, labels, strict=True))
    return PopeResult(
        true_yes=count["yes", "yes"],
        false_yes=count["yes", "no"],
        true_no=count["no", "no"],
        false_no=count["no", "yes"],
        unparsed_yes=count[None, "yes"],
        unparsed_no=count[None, "no"],
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
