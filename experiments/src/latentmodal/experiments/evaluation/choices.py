"""One picture, its caption and a false one: how often is the true caption preferred?

Shapes: P pairs of captions, E embedding width, V embeddings of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.retrieval import TIE, paired_cosines, unit_rows


@dataclass(frozen=True, kw_only=True)
class ChoiceResult:
    """``share`` in [0, 1] of ``num_pairs`` told apart; ``standard_error`` is binomial."""

    share: float
    standard_error: float
    num_pairs: int
    chance: float = 0.5


def told_apart(
    image_PE: Tensor, positive_PE: Tensor, negative_PE: Tensor, kinds: Sequence[str]
) -> dict[str, ChoiceResult]:
    """Share of pairs in which the true caption scores higher, by kind of false caption.

    A tie counts as not told apart, so a model blind to the difference (a bag of words, when only
    the order was swapped) scores 0, not one half.

    Args:
        image_PE: the picture of each pair, with one embedding or several (P, V, E) of which the
            best counts; a picture may occur in several pairs.
        positive_PE: its true caption.
        negative_PE: the false one.
        kinds: what was changed in each pair, such as ``"relation_swap"``.

    Raises:
        UserError: the four differ in length, or embeddings are zero or not finite.
    """
    lengths = (len(image_PE), len(positive_PE), len(negative_PE), len(kinds))
    if len(set(lengths)) != 1:
        raise UserError(
            "told_apart needs as many images, captions, false captions and kinds, got "
            + ", ".join(map(str, lengths))
        )
    image_PE = unit_rows(image_PE, "image")
    return preferred(
        paired_cosines(image_PE, unit_rows(positive_PE, "caption")),
        paired_cosines(image_PE, unit_rows(negative_PE, "false caption")),
        kinds,
    )


def preferred(
    true_P: Tensor, false_P: Tensor, kinds: Sequence[str], tie: float = TIE
) -> dict[str, ChoiceResult]:
    """Share of pairs in which the true caption scores higher, by kind of false caption.

    Args:
        true_P: the score of each true caption with its picture.
        false_P: the score of the false one.
        kinds: what was changed in each pair.
        tie: scores closer than this are equal, and count as not told apart.
    """
    right_P = true_P - false_P > tie
    results = {}
    for kind in sorted(set(kinds)):
        of_kind_P = torch.tensor([k == kind for k in kinds], device=right_P.device)
        num_pairs = int(of_kind_P.sum())
        share = int(right_P[of_kind_P].sum()) / num_pairs
        error = (share * (1 - share) / num_pairs) ** 0.5
        results[kind] = ChoiceResult(share=share, standard_error=error, num_pairs=num_pairs)
    return results
