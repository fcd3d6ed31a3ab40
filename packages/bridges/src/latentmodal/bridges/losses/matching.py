"""Image-text matching with hard negatives (ITM).

BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1), after ALBEF (Li et al. 2021, arXiv
2107.07651): does this text fit this image? Wrong pairs are drawn by similarity, so that they are
hard to tell.

Shape suffixes: B local pairs, N columns (the pairs of all ranks), R rows with a verdict.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.distributed import all_gather, rank, world_size
from latentmodal.bridges.losses.rows import global_mean, widen


class Negatives(NamedTuple):
    """For each local row one column that does not belong to it."""

    index_B: Tensor
    """int64 in [0, N)."""
    valid_B: Tensor
    """bool; False where every column belongs to the row, whose index then means nothing."""


@torch.no_grad()
def sample_hard_negatives(
    logits_BN: Tensor, ids_B: Tensor, *, seed: int, group: dist.ProcessGroup | None = None
) -> Negatives:
    """Draw one wrong column per row, with the probability softmax gives it.

    The draw depends on the seed and on the row's place in the global batch only: not on how many
    ranks share the work. Nothing is read back to the host.

    Args:
        logits_BN: similarities of local rows with the columns of all ranks (zeros draw uniformly).
        ids_B: int64; columns with the id of a row are right for it and never drawn.
        seed: the same on every rank, another one at every step.
        group: the ranks that share a batch; default: all.
    """
    rows, columns = logits_BN.shape
    generator = torch.Generator(logits_BN.device).manual_seed(seed)
    total = rows * world_size(group)
    uniform_XN = torch.rand(
        total, columns, generator=generator, device=logits_BN.device, dtype=torch.float32
    )
    first = rank(group) * rows
    uniform_BN = uniform_XN[first : first + rows].clamp_(1e-20, 1 - 1e-7)
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    noisy_BN = logits_BN.float() - torch.log(-torch.log(uniform_BN))
    right_BN = ids_B[:, None] == all_gather(ids_B, group)[None, :]
    noisy_BN = noisy_BN.masked_fill(right_BN, -torch.inf)
    return Negatives(noisy_BN.argmax(dim=1), ~right_BN.all(dim=1))


def image_text_matching(
    logits_R2: Tensor,
    labels_R: Tensor,
    valid_R: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean cross-entropy of the verdicts over the valid rows of all ranks.

    Args:
        logits_R2: "does not fit", "fits".
        labels_R: int64, 1 where text and image belong together.
        valid_R: bool, False for rows to leave out; None: all count.
        group: the ranks that share a batch; default: all.

    Returns:
        Scalar; its mean over the ranks is the mean over the global batch.
    """
    losses_R = F.cross_entropy(widen(logits_R2), labels_R, reduction="none")
    if valid_R is None:
        valid_R = torch.ones_like(labels_R, dtype=torch.bool)
    return global_mean((losses_R * valid_R).sum(), valid_R.sum(), group)
