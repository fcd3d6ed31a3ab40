"""Counted n-grams, shared by BLEU and CIDEr-D."""

from collections import Counter
from typing import TypeAlias

Tokens: TypeAlias = tuple[str, ...]


def ngrams(tokens: Tokens, n: int) -> Counter[Tokens]:
    """How often each run of ``n`` tokens occurs."""
    return Counter(tokens[start : start + n] for start in range(len(tokens) - n + 1))
