"""CIDEr-D (Vedantam et al., 2015), which papers and pycocoevalcap call CIDEr."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from latentmodal.experiments.evaluation.captions.ngrams import Tokens, ngrams

_MAX_N: Final = 4
_SIGMA: Final = 6.0
"""Width, in words, of the Gaussian that punishes a difference in length."""
_SCALE: Final = 10.0


@dataclass(frozen=True)
class _Weighted:
    """A caption as one TF-IDF vector for each n."""

    vectors: list[dict[Tokens, float]]
    norms: list[float]
    length: int
    """Number of bigrams, as in the reference implementation: one less than the words, but 0 for
    an empty caption too, so that no caption and a single word are equally long."""


def cider_d(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> list[float]:
    """CIDEr-D of each picture, in [0, 10]; published figures are 100 times their mean.

    An n-gram weighs the more the fewer pictures have it in a reference; pictures are those given
    here. Scores of different sets, or of a part and the whole, are therefore not comparable, and
    with one picture every weight, and so the score, is 0.

    Args:
        references: tokens of the references of each picture, at least one each.
        candidates: tokens of the one candidate of each picture.
    """
    documents: Counter[Tokens] = Counter()
    for own in references:
        documents.update(
            {gram for reference in own for n in range(_MAX_N) for gram in ngrams(reference, n + 1)}
        )
    log_pictures = math.log(len(references))

    def weigh(tokens: Tokens) -> _Weighted:
        vectors = [
            {
                gram: count * (log_pictures - math.log(max(1, documents[gram])))
                for gram, count in ngrams(tokens, n + 1).items()
            }
            for n in range(_MAX_N)
        ]
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return _Weighted(vectors, norms, max(0, len(tokens) - 1))

    scores = []
    for own, candidate in zip(references, candidates, strict=True):
        weighted = weigh(candidate)
        total = sum(_similarity(weighted, weigh(reference)) for reference in own)
        scores.append(_SCALE * total / len(own))
    return scores


def _similarity(candidate: _Weighted, reference: _Weighted) -> float:
    """Mean over n of the clipped cosine, times the penalty for another length."""
    total = 0.0
    for n in range(_MAX_N):
        norms = candidate.norms[n] * reference.norms[n]
        if norms == 0:
            continue
        theirs = reference.vectors[n]
        total += (
            sum(
                min(weight, theirs[gram]) * theirs[gram]
                for gram, weight in candidate.vectors[n].items()
                if gram in theirs
            )
            / norms
        )
    difference = candidate.length - reference.length
    return total / _MAX_N * math.exp(-(difference**2) / (2 * _SIGMA**2))
