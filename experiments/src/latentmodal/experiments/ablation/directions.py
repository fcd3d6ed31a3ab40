"""Which values of a metric are better."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from latentmodal.experiments.ablation.statistics import Better

_LOWER: Final = (
    *("*median_rank", "loss*", "*_loss", "perplexity*", "CHAIRi", "CHAIRs", "hallucination*"),
    *("repeats", "repeats_*", "rep-*", "unfinished", "broken_sentences", "unparsed"),
)
_NEITHER: Final = ("yes_ratio", "mentions", "words", "sentences", "tokens")


def better_values(metric: str) -> Better | None:
    """Whether `higher` or `lower` values of "section/metric" are better; None where neither are."""
    name = metric.partition("/")[2] or metric
    if any(fnmatchcase(name, pattern) for pattern in _LOWER):
        return "lower"
    return None if name in _NEITHER else "higher"
