"""Which words of a text are new in it, and which are gone from its next version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from typing import NamedTuple

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each is a word of its own
_WORD = rf"(?:(?![{_IDEOGRAPH}])\w)+"
_TOKEN = re.compile(rf"\s+|[{_IDEOGRAPH}]|{_WORD}(?:['’-]{_WORD})*|[^\w\s]")
_MANY_WORDS = 500  # beyond, words that are everywhere no longer anchor the comparison (quadratic)


class Piece(NamedTuple):
    """A stretch of a text.

    Attributes:
        text: the stretch; all stretches in a row are the text.
        new: the version before does not have it.
        gone: the next version does not have it.
    """

    text: str
    new: bool
    gone: bool


def mark_versions(texts: Sequence[str]) -> list[list[Piece]]:
    """The versions of a text, oldest first, each cut where what is new or gone begins and ends."""
    versions = [_TOKEN.findall(text) for text in texts]
    new: list[set[int]] = [set() for _ in versions]
    gone: list[set[int]] = [set() for _ in versions]
    for index, (before, after) in enumerate(pairwise(versions)):
        gone[index], new[index + 1] = _differences(before, after)
    return [
        _pieces(tokens, [(at in fresh, at in lost) for at in range(len(tokens))])
        for tokens, fresh, lost in zip(versions, new, gone, strict=True)
    ]


def _differences(before: list[str], after: list[str]) -> tuple[set[int], set[int]]:
    """Positions of the tokens only `before` has, and of those only `after` has; no blanks."""
    words_before = [at for at, token in enumerate(before) if not token.isspace()]
    words_after = [at for at, token in enumerate(after) if not token.isspace()]
    matcher = SequenceMatcher(
        None,
        [before[at] for at in words_before],
        [after[at] for at in words_after],
        autojunk=max(len(words_before), len(words_after)) > _MANY_WORDS,
    )
    gone: set[int] = set()
    new: set[int] = set()
    for kind, start, end, other_start, other_end in matcher.get_opcodes():
        if kind != "equal":
            gone.update(words_before[start:end])
            new.update(words_after[other_start:other_end])
    return gone, new


def _pieces(tokens: list[str], marks: list[tuple[bool, bool]]) -> list[Piece]:
    """Join neighbours that are marked alike; a blank between two such belongs to them."""
    joined = list(marks)
    for at in range(1, len(tokens) - 1):
        if tokens[at].isspace() and marks[at - 1] == marks[at + 1]:
            joined[at] = marks[at - 1]
    return [
        Piece("".join(tokens[at] for at in group), *mark)
        for mark, group in groupby(range(len(tokens)), key=joined.__getitem__)
    ]
