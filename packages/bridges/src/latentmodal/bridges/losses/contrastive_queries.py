"""Image-text contrastive learning over several embeddings per image (ITC).

BLIP-2 (Li et al. 2023, arXiv 2301.12597, section 3.1): of an image's query embeddings the one
nearest to the text counts.

Shape suffixes: B local pairs, M queries, E embed dim, W ranks, N = W*B columns.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.distributed import all_gather, gather_with_grad, rank, world_size
from latentmodal.bridges.losses.rows import shared_target_loss, widen


class ContrastiveResult(NamedTuple):
    """The loss, and the similarities it was taken of, which choose hard negatives."""

    loss: Tensor
    image_to_text_BN: Tensor
    """Local images against the texts of all ranks, divided by the temperature."""
    text_to_image_BN: Tensor
    """Local texts against the images of all ranks."""


def image_text_contrastive(
    image_BME: Tensor,
    text_BE: Tensor,
    temperature: Tensor,
    *,
    ids_B: Tensor | None = None,
    label_smoothing: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> ContrastiveResult:
    """Cross-entropy of each image over all texts and of each text over all images, averaged.

    The embeddings of other ranks come with their gradients, so that the gradient is that of one
    process holding the whole batch. The maths is done in float32, whatever autocast says.

    Args:
        image_BME: unit rows, one per query; the same B on every rank.
        text_BE: unit rows; text i belongs to image i.
        temperature: similarities are divided by it, shape () or (1,).
        ids_B: int64, meaningful across ranks: which image pair i is about. Pairs of one image are
            positives of one another and share the target evenly. None: every image is another.
        label_smoothing: share of the target that is spread evenly over all columns.
        group: the ranks that share a batch; default: all.

    Raises:
        ValueError: shapes, ids or `label_smoothing` that make no sense.
    """
    _check(image_BME, text_BE, ids_B, label_smoothing)
    with torch.autocast(image_BME.device.type, enabled=False):
        image_BME, text_BE, temperature = widen(image_BME), widen(text_BE), widen(temperature)
        image_to_text_BN = _best_query(image_BME, gather_with_grad(text_BE, group)) / temperature
        if world_size(group) == 1:
            text_to_image_BN = image_to_text_BN.T
        else:
            image_NME = gather_with_grad(image_BME, group)
            text_to_image_BN = _best_query(image_NME, text_BE).T / temperature
        if ids_B is None:
            first = rank(group) * len(text_BE)
            labels_B = torch.arange(first, first + len(text_BE), device=text_BE.device)
            losses = [
                F.cross_entropy(logits_BN, labels_B, label_smoothing=label_smoothing)
                for logits_BN in (image_to_text_BN, text_to_image_BN)
            ]
        else:
            ids_N = all_gather(ids_B, group)
            losses = [
                shared_target_loss(logits_BN, ids_B, ids_N, label_smoothing)
                for logits_BN in (image_to_text_BN, text_to_image_BN)
            ]
    return ContrastiveResult((losses[0] + losses[1]) / 2, image_to_text_BN, text_to_image_BN)


def _best_query(image_IME: Tensor, text_JE: Tensor) -> Tensor:
    """(I images, J texts): the cosine of each text with the image's nearest query."""
    similarity_IMJ = image_IME @ text_JE.T
    return similarity_IMJ.amax(dim=1)


def _check(image_BME: Tensor, text_BE: Tensor, ids_B: Tensor | None, smoothing: float) -> None:
    images, texts = tuple(image_BME.shape), tuple(text_BE.shape)
    if len(images) != 3 or len(texts) != 2 or images[::2] != texts:
        raise ValueError(
            f"image has shape {images} and text {texts}; they must be (pairs, queries, embed_dim) "
            "and (pairs, embed_dim)"
        )
    if ids_B is not None and (tuple(ids_B.shape) != texts[:1] or ids_B.dtype != torch.int64):
        raise ValueError(
            f"ids_B is {ids_B.dtype} of shape {tuple(ids_B.shape)}; it must be int64 of shape "
            f"({texts[0]},)"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing is {smoothing}; it must be in [0, 1)")
