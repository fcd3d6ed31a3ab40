"""Labels and loss over what the model is to say, and over nothing else.

Shapes: B samples, T positions, N = B*T, D hidden width, V vocabulary, A positions that predict
an answer.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX: Final = -100
"""The label of positions without a target, as in `torch.nn.functional.cross_entropy`."""


def answer_labels(ids: Sequence[int], answer_spans: Sequence[tuple[int, int]]) -> list[int]:
    """Copy ``ids`` inside the half-open ``answer_spans``; `IGNORE_INDEX` everywhere else.

    Labels stand at the position of the token itself; `answer_loss` does the shift.

    Raises:
        ValueError: a span is not within ``ids``.
    """
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in answer_spans:
        if not 0 <= start <= stop <= len(ids):
            raise ValueError(f"answer span ({start}, {stop}) is not within the {len(ids)} ids")
        labels[start:stop] = ids[start:stop]
    return labels


def answer_loss(
    hidden_BTD: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    labels_BT: Tensor,
    *,
    num_targets: int | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Mean next-token cross-entropy over the labelled positions; see `target_loss`.

    Args:
        hidden_BTD: the last hidden states; position t predicts token t+1.
        lm_head: hidden states ``(A, D)`` to logits ``(A, V)``.
        labels_BT: ids where there is a target, `IGNORE_INDEX` elsewhere.
        num_targets: labels that are not ignored, the first column aside
            (`PromptBatch.num_targets`). With it an accelerator is never waited for.
        denominator: see `target_loss`.
    """
    # Shift the labels, not the hidden states: flattening the latter then stays a view.
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    return target_loss(
        hidden_BTD, lm_head, targets_BT, num_targets=num_targets, denominator=denominator
    )


def target_loss(
    hidden_BTD: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    targets_BT: Tensor,
    *,
    num_targets: int | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Mean cross-entropy over the positions that have a target.

    Equal to computing all logits and ignoring the rest, at a fraction of the memory: the head,
    often the largest product of the model, sees only the positions that predict an answer. The
    softmax is taken in float32 or better. A batch without targets gives 0, still attached to the
    graph, so that every rank runs the same collectives.

    Args:
        hidden_BTD: the last hidden states; position t predicts ``targets_BT[:, t]``.
        lm_head: hidden states ``(A, D)`` to logits ``(A, V)``.
        targets_BT: ids, or `IGNORE_INDEX`.
        num_targets: how many are not ignored, counted here if None (one synchronisation when the
            targets are on an accelerator).
        denominator: divides the summed loss in place of the number of targets; ranks that share
            one, (targets of all ranks) / ranks, get the full batch's mean from averaged gradients.
    """
    targets_N = targets_BT.flatten()
    labelled_N = targets_N != IGNORE_INDEX
    if num_targets is None:
        num_targets = int(labelled_N.sum())
    index_A = torch.nonzero_static(labelled_N, size=num_targets).squeeze(1)
    hidden_AD = hidden_BTD.flatten(0, 1).index_select(0, index_A)
    logits_AV = lm_head(hidden_AD)
    targets_A = targets_N.index_select(0, index_A)
    logits_AV = logits_AV.to(torch.promote_types(logits_AV.dtype, torch.float32))
    total = F.cross_entropy(logits_AV, targets_A, reduction="sum")
    return total / (max(num_targets, 1) if denominator is None else denominator)
