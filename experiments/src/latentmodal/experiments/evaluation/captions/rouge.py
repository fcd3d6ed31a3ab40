"""ROUGE-L as COCO's caption evaluation takes it (Lin, 2004)."""

from collections.abc import Sequence
from typing import Final

from latentmodal.experiments.evaluation.captions.ngrams import Tokens

_BETA: Final = 1.2
"""Weight of recall against precision."""


def rouge_l(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> float:
    """Mean over pictures of the F-measure of the longest common subsequence, in [0, 1].

    The best precision and the best recall are taken apart: they may be of two references.
    """
    scores = [
        _best_f(own, candidate) for own, candidate in zip(references, candidates, strict=True)
    ]
    return sum(scores) / len(scores)


def _best_f(references: Sequence[Tokens], candidate: Tokens) -> float:
    common = [_common_length(reference, candidate) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(
        length / len(reference)
        for length, reference in zip(common, references, strict=True)
        if reference
    )
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence, by one row of the usual table."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for place, other in enumerate(b, 1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
