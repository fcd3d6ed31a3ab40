"""What the losses share.

Shape suffixes: B local images, M local texts, E embed dim, R rows of one direction, N all columns
of that direction.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.distributed import sum_over_ranks, world_size


def check_rows(
    image_BE: Tensor, text_ME: Tensor, image_ids_B: Tensor | None, text_ids_M: Tensor | None
) -> None:
    """Raise ValueError unless images, texts and ids fit together."""
    images, texts = tuple(image_BE.shape), tuple(text_ME.shape)
    if len(images) != 2 or len(texts) != 2 or images[1] != texts[1]:
        raise ValueError(
            f"image has shape {images} and text {texts}; both must be (rows, embed_dim) with the "
            "same embed_dim"
        )
    if (image_ids_B is None) != (text_ids_M is None):
        absent = "image_ids_B" if image_ids_B is None else "text_ids_M"
        raise ValueError(f"{absent} is missing; give ids for both images and texts, or for neither")
    if image_ids_B is None or text_ids_M is None:
        if images[0] != texts[0]:
            raise ValueError(
                f"{images[0]} images and {texts[0]} texts cannot be paired row by row; pass "
                "image_ids_B and text_ids_M to say which belong together"
            )
        return
    for name, ids, rows in (
        ("image_ids_B", image_ids_B, images[0]),
        ("text_ids_M", text_ids_M, texts[0]),
    ):
        if tuple(ids.shape) != (rows,) or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} is {ids.dtype} of shape {tuple(ids.shape)}; it must be int64 of shape "
                f"({rows},)"
            )


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def shared_target_loss(
    logits_RN: Tensor, row_ids_R: Tensor, column_ids_N: Tensor, label_smoothing: float
) -> Tensor:
    """Mean cross-entropy against targets spread evenly over the columns of equal id."""
    positive_RN = (row_ids_R[:, None] == column_ids_N[None, :]).to(logits_RN.dtype)
    count_R1 = positive_RN.sum(dim=1, keepdim=True)
    target_RN = positive_RN * ((1 - label_smoothing) / count_R1.clamp(min=1))
    if label_smoothing:
        target_RN += count_R1.clamp(max=1) * (label_smoothing / logits_RN.shape[1])
    return F.cross_entropy(logits_RN, target_RN)


def global_mean(total: Tensor, count: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A local sum to what, averaged over the ranks, is the sum over the count of all ranks.

    Ranks seldom hold equally many tokens; the mean of their means would weigh tokens unequally.
    """
    everywhere = sum_over_ranks(count.to(total.dtype), group)
    return total * (world_size(group) / everywhere.clamp(min=1))
