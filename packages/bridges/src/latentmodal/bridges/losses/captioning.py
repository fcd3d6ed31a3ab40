"""Image-grounded text generation (ITG): say what is in the image, word by word.

BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1).

Shape suffixes: B texts, T text tokens, D width, A positions that predict a word, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.losses.rows import global_mean, widen


def grounded_generation(
    hidden_BTD: Tensor,
    head: Callable[[Tensor], Tensor],
    ids_BT: Tensor,
    mask_BT: Tensor,
    *,
    label_smoothing: float = 0.1,
    num_targets: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean cross-entropy of each token given the ones before it, over all ranks' tokens.

    The head, with its vocabulary the widest map of all, sees only positions that predict a token.

    Args:
        hidden_BTD: position t predicts token t+1.
        head: hidden states (A, D) to logits (A, V).
        ids_BT: the tokens; the first predicts and is never predicted.
        mask_BT: bool, True for tokens, False for padding.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        num_targets: tokens after the first, counted by the loader; spares a look at the mask, for
            which an accelerator would have to be waited for.
        group: the ranks that share a batch; default: all.

    Returns:
        Scalar; its mean over the ranks is the mean over the global batch.
    """
    predicting_X = F.pad(mask_BT[:, 1:], (0, 1), value=False).flatten()
    if num_targets is None:
        num_targets = int(predicting_X.sum())
    index_A = torch.nonzero_static(predicting_X, size=num_targets).squeeze(1)
    logits_AV = widen(head(hidden_BTD.flatten(0, 1).index_select(0, index_A)))
    targets_A = F.pad(ids_BT[:, 1:], (0, 1)).flatten().index_select(0, index_A)
    total = F.cross_entropy(logits_AV, targets_A, label_smoothing=label_smoothing, reduction="sum")
    count = torch.full((), num_targets, device=total.device)
    return global_mean(total, count, group)
