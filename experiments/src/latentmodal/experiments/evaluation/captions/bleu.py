"""BLEU-1 to BLEU-4 over a corpus, as COCO's caption evaluation takes it.

Papineni et al., 2002, with clipped n-gram counts and the brevity penalty summed over the corpus.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from latentmodal.experiments.evaluation.captions.ngrams import Tokens, ngrams

# Without any match the score is tiny, not an error; both values are COCO's and visible in the
# fifteenth digit only.
_TINY: Final = 1e-15
_SMALL: Final = 1e-9

_MAX_N: Final = 4


def bleu(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> list[float]:
    """BLEU-1, -2, -3 and -4, in [0, 1].

    The length a candidate is held against is that of the reference closest in length, the shorter
    of two equally close.

    Args:
        references: tokens of the references of each picture, at least one each.
        candidates: tokens of the one candidate of each picture.
    """
    matched, proposed = [0] * _MAX_N, [0] * _MAX_N
    candidate_length = reference_length = 0
    for own, candidate in zip(references, candidates, strict=True):
        candidate_length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        for n in range(1, _MAX_N + 1):
            most: Counter[Tokens] = Counter()
            for reference in own:
                most |= ngrams(reference, n)
            matched[n - 1] += (ngrams(candidate, n) & most).total()
            proposed[n - 1] += max(0, len(candidate) - n + 1)

    ratio = (candidate_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n, (hits, total) in enumerate(zip(matched, proposed, strict=True), 1):
        product *= (hits + _TINY) / (total + _SMALL)
        scores.append(brevity * product ** (1 / n))
    return scores
