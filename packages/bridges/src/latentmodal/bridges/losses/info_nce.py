"""Symmetric InfoNCE, the loss of CLIP (arXiv 2103.00020, figure 3).

Shape suffixes: B local images, M local texts, W ranks, E embed dim, N all columns of one
direction (W*M texts or W*B images).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.distributed import all_gather, gather_with_grad, rank, world_size
from latentmodal.bridges.losses.rows import check_rows, shared_target_loss, widen


def info_nce(
    image_BE: Tensor,
    text_ME: Tensor,
    logit_scale: Tensor,
    *,
    image_ids_B: Tensor | None = None,
    text_ids_M: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of each image over all texts and of each text over all images, averaged.

    Each rank holds logits for its own rows only: (B, W*M) and (M, W*B), never all by all. The maths
    is done in float32, whatever autocast says.

    Args:
        image_BE: unit rows; the same B on every rank.
        text_ME: unit rows; the same M on every rank.
        logit_scale: the factor on the cosines, shape () or (1,).
        image_ids_B, text_ids_M: int64, meaningful across ranks (an index into the data set, say).
            A text is right for an image when their ids are equal; several right answers share the
            target evenly. A row with no right answer adds nothing but is still counted in the
            mean. None: text i of a rank belongs to its image i.
        label_smoothing: share of the target that is spread evenly over all columns.
        group: the ranks that share a batch; default: all.

    Returns:
        Scalar, the mean over local rows; see the package docstring for what ranks add up to.

    Raises:
        ValueError: shapes, ids or `label_smoothing` that make no sense.
    """
    check_rows(image_BE, text_ME, image_ids_B, text_ids_M)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 1)")

    with torch.autocast(image_BE.device.type, enabled=False):
        # Widened before the gather so that its backward sums over ranks in float32 as well.
        image_BE, text_ME = widen(image_BE), widen(text_ME)
        scaled_image_BE = widen(logit_scale) * image_BE
        if world_size(group) == 1:
            image_logits_BN = scaled_image_BE @ text_ME.T
            text_logits_MN = image_logits_BN.T
        else:
            image_logits_BN = scaled_image_BE @ gather_with_grad(text_ME, group).T
            scaled_text_ME = widen(logit_scale) * text_ME
            text_logits_MN = scaled_text_ME @ gather_with_grad(image_BE, group).T

        if image_ids_B is None or text_ids_M is None:
            first = rank(group) * image_BE.shape[0]
            labels_B = torch.arange(first, first + image_BE.shape[0], device=image_BE.device)
            image_loss = F.cross_entropy(image_logits_BN, labels_B, label_smoothing=label_smoothing)
            text_loss = F.cross_entropy(text_logits_MN, labels_B, label_smoothing=label_smoothing)
        else:
            all_text_ids_N = all_gather(text_ids_M, group)
            all_image_ids_N = all_gather(image_ids_B, group)
            image_loss = shared_target_loss(
                image_logits_BN, image_ids_B, all_text_ids_N, label_smoothing
            )
            text_loss = shared_target_loss(
                text_logits_MN, text_ids_M, all_image_ids_N, label_smoothing
            )
        return (image_loss + text_loss) / 2
