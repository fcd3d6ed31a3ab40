"""What is wrong with a long description, as pure functions of its text.

`find_fault` drops descriptions by them; an evaluation measures how often they hold.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import groupby
from typing import Final

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_CLOSING = "\"'”’)]»"
# A sentence ends at its mark and the quotes or brackets closed there, if white space follows; so
# 3.5 does not, nor do the abbreviations below and initials.
_SENTENCE_END = re.compile(rf"(?<=[.!?。！？])[{re.escape(_CLOSING)}]*(?:\s+|$)|(?<=[。！？])")
_ABBREVIATION = re.compile(r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|e\.g|i\.e|approx|ca|No))\.$")
_END_MARKS = ".!?。！？"

DANGLING: Final = frozenset(
    [
        *("a", "an", "the", "and", "or", "but", "nor", "of", "with", "at", "as", "than", "into"),
        *("onto", "between", "among", "beside", "beneath", "because", "while", "although", "if"),
        *("whose", "whom", "very", "my", "your", "our", "its", "their", "has", "have", "being"),
    ]
)
"""Words no sentence of a description ends with, for they ask for another one."""
# Others may end a good one: "the light is on", "a man walks by", "what they are".

_REMAINS = re.compile(
    r"###|</?s>|<\|[^|<>]{1,40}\|>|<unk>|<pad>|\[/?INST\]|</?Img>|<image>|<ImageHere>",
    re.IGNORECASE,
)
_STUTTER = re.compile(r"([^\w\s.])\1{3,}|\.{5,}")
_CONTROL_CATEGORIES = ("Cc", "Co", "Cn", "Cs")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark; the last may lack one."""
    found: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        piece = text[start : end.end()].strip()
        if not piece or (_ABBREVIATION.search(piece) and text[end.end() :].strip()):
            continue
        found.append(piece)
        start = end.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


def word_repetition(text: str) -> int:
    """The longest run of one word said in succession: 0 without words, 1 without repetition."""
    return max((len(list(run)) for _, run in groupby(words(text))), default=0)


def repeated_ngrams(text: str, n: int) -> float:
    """The share of n-grams of words that were said before: 0 where all differ.

    This is rep-n, 1 - unique n-grams / n-grams (Su et al. 2022, arXiv 2202.06417, section 4.2).
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    said = words(text)
    ngrams = [tuple(said[at : at + n]) for at in range(len(said) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repeated_sentences(text: str) -> int:
    """How many sentences only say again, word for word, what an earlier one said."""
    said = [tuple(words(sentence)) for sentence in sentences(text)]
    said = [sentence for sentence in said if sentence]
    return len(said) - len(set(said))


def broken_sentences(text: str) -> list[str]:
    """Sentences without an end mark, or that end in a word which asks for another one."""
    return [sentence for sentence in sentences(text) if _is_broken(sentence)]


def is_unfinished(text: str) -> bool:
    """Whether the text stops in the middle of a sentence; one that says nothing does too."""
    said = sentences(text)
    return not said or _is_broken(said[-1])


def nonsense_characters(text: str) -> int:
    """How many characters have no place in prose.

    These are control, private and unassigned characters, the replacement character, marks said
    over and over ("!!!!!"), and remains of prompts and special tokens ("###", "</s>").
    """
    remains = sum(len(match.group()) for match in _REMAINS.finditer(text))
    rest = _REMAINS.sub(" ", text)
    stutters = sum(len(match.group()) for match in _STUTTER.finditer(rest))
    rest = _STUTTER.sub(" ", rest)
    return remains + stutters + sum(map(_is_nonsense, rest))


def without_nonsense(text: str) -> str:
    """The text with nothing left for `nonsense_characters` to count; of a mark said over, one."""
    plain = "".join(character for character in text if not _is_nonsense(character))
    return _STUTTER.sub(lambda match: match[0][0], _REMAINS.sub(" ", plain))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The limits a description must keep.

    Attributes:
        min_words, max_words: its length.
        max_nonsense: characters that have no place in prose.
        max_word_run: times one word is said in succession.
        ngram, max_ngram_share: the share of n-grams of words that may have been said before.
        max_repeated_sentences: sentences that say an earlier one again.
        max_broken: sentences broken off before the last one.
        finished: whether the last sentence must be whole.
    """

    min_words: int = 10
    max_words: int = 300
    max_nonsense: int = 0
    max_word_run: int = 2
    ngram: int = 4
    max_ngram_share: float = 0.25
    max_repeated_sentences: int = 0
    max_broken: int = 0
    finished: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"min_words={self.min_words} must be between 0 and max_words={self.max_words}"
            )
        for name in ("max_word_run", "ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_nonsense", "max_repeated_sentences", "max_broken"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.max_ngram_share <= 1:
            raise ValueError(f"max_ngram_share is {self.max_ngram_share}; it must lie in 0 to 1")


def find_fault(text: str, rules: Rules) -> str | None:
    """The first rule a text breaks, as `name: what is wrong`; None if it breaks none."""
    count = len(words(text))
    if count < rules.min_words:
        return f"too_short: {count} words"
    if count > rules.max_words:
        return f"too_long: {count} words"
    if (strange := nonsense_characters(text)) > rules.max_nonsense:
        return f"nonsense_characters: {strange}"
    if (run := word_repetition(text)) > rules.max_word_run:
        return f"word_repetition: one word {run} times in succession"
    # Before n-grams: a sentence said twice repeats those as well, and says more about the fault.
    if (again := repeated_sentences(text)) > rules.max_repeated_sentences:
        return f"sentence_repetition: {again} said again"
    if (share := repeated_ngrams(text, rules.ngram)) > rules.max_ngram_share:
        return f"ngram_repetition: {share:.0%} of {rules.ngram}-grams said before"
    if rules.finished and is_unfinished(text):
        return f"unfinished_sentence: {_tail(text)}"
    inner = len(broken_sentences(text)) - is_unfinished(text)
    if inner > rules.max_broken:
        return f"broken_sentence: {inner}"
    return None


def _is_broken(sentence: str) -> bool:
    bare = sentence.rstrip(_CLOSING + " ")
    if not bare or bare[-1] not in _END_MARKS or bare.endswith("..") or sentence.endswith("…"):
        return True
    said = words(sentence)
    return not said or said[-1] in DANGLING


def _is_nonsense(character: str) -> bool:
    if character in "\n\t\r" or character.isascii():
        return not (character.isprintable() or character in "\n\t\r")
    return character == "\N{REPLACEMENT CHARACTER}" or (
        unicodedata.category(character) in _CONTROL_CATEGORIES
    )


def _tail(text: str, length: int = 40) -> str:
    flat = " ".join(text.split())
    return f"…{flat[-length:]}" if len(flat) > length else flat
