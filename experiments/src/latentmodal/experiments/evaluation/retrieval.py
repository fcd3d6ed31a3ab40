"""Recall at K in both directions, with several captions per image and ties against the model.

Shapes: N images, M texts, E embedding width, Q queries, G gallery, K results of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from latentmodal.experiments.errors import UserError

TIE: Final = 1e-6
"""Cosines closer than this are equal.

Embeddings are float32, and the same picture embedded in two batches already differs by about 1e-7:
without a tolerance a model that maps everything to one point would be scored by rounding noise.
"""


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Shares in [0, 1] by K; ranks start at 1. ``num_queries`` images have a caption."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]
    median_rank_image_to_text: float
    median_rank_text_to_image: float
    num_images: int
    num_texts: int
    num_queries: int


def retrieval_metrics(
    image_NE: Tensor,
    text_ME: Tensor,
    text_to_image_M: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 2048,
) -> RetrievalResult:
    """Score every image against every text by cosine and rank both ways.

    An image is a hit at K when any of its captions is among its K best texts: its best own caption
    is ranked among all captions of other images. A caption is a hit when its image is among its K
    best images. The rank is one plus the number of others that score at least as well, so ties,
    and a model that collapsed, never help. This is the protocol of published COCO and Flickr30K
    recall. An image without caption asks nothing but stands among the images to find. A K larger
    than the gallery is always hit, as its chance level of 1 then shows.

    Args:
        image_NE: image embeddings, of any length but zero.
        text_ME: text embeddings.
        text_to_image_M: int64, the row of ``image_NE`` each text describes.
        ks: the K to report.
        chunk: scores are made in blocks of ``chunk`` x ``chunk`` float64.

    Raises:
        UserError: nothing to score, a K below 1, a reference outside the images, or embeddings
            that are zero or not finite.
    """
    _check(image_NE, text_ME, text_to_image_M, ks)
    image_NE, text_ME = unit_rows(image_NE, "image"), unit_rows(text_ME, "text")
    owner_M = text_to_image_M.to(text_ME.device)
    num_images, num_texts = len(image_NE), len(text_ME)

    own_M = (image_NE[owner_M] * text_ME).sum(dim=1)
    best_own_N = own_M.new_full((num_images,), -torch.inf)
    best_own_N = best_own_N.scatter_reduce(0, owner_M, own_M, reduce="amax")
    rank_of_text_N = owner_M.new_ones(num_images)
    rank_of_image_M = owner_M.new_ones(num_texts)
    row_N = torch.arange(num_images, device=owner_M.device)
    for images in _blocks(num_images, chunk):
        for texts in _blocks(num_texts, chunk):
            scores_NM = image_NE[images] @ text_ME[texts].T
            foreign_NM = row_N[images, None] != owner_M[None, texts]
            beats_image = (scores_NM >= best_own_N[images, None] - TIE) & foreign_NM
            beats_text = (scores_NM >= own_M[None, texts] - TIE) & foreign_NM
            rank_of_text_N[images] += beats_image.sum(dim=1)
            rank_of_image_M[texts] += beats_text.sum(dim=0)

    captions_N = torch.bincount(owner_M, minlength=num_images)
    rank_of_text_Q = rank_of_text_N[captions_N > 0]
    return RetrievalResult(
        image_to_text={k: _share(rank_of_text_Q <= k) for k in ks},
        text_to_image={k: _share(rank_of_image_M <= k) for k in ks},
        chance_image_to_text={k: chance_any_of(captions_N, num_texts, k) for k in ks},
        chance_text_to_image={k: min(k / num_images, 1.0) for k in ks},
        median_rank_image_to_text=_median(rank_of_text_Q),
        median_rank_text_to_image=_median(rank_of_image_M),
        num_images=num_images,
        num_texts=num_texts,
        num_queries=len(rank_of_text_Q),
    )


def chance_any_of(captions_N: Tensor, num_texts: int, k: int) -> float:
    """Chance that K texts drawn blindly hold any caption of the image, mean over images.

    Hypergeometric: an image with c of the M captions is missed with C(M-c, K) / C(M, K).

    Args:
        captions_N: captions of each image; images without any do not ask and do not count.
        num_texts: M.
        k: texts drawn, at most all of them.
    """
    k = min(k, num_texts)
    counts, images = captions_N[captions_N > 0].unique(return_counts=True)
    missed = sum(
        weight * (comb(num_texts - own, k) / comb(num_texts, k))
        for own, weight in zip(counts.tolist(), images.tolist(), strict=True)
    )
    return 1.0 - missed / int(images.sum())


def top_k(query_QE: Tensor, gallery_GE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and rows of the K best of the gallery, ``(Q, K)`` each, best first.

    K is cut to the size of the gallery; equal scores keep the gallery's order.
    """
    scores_QG = unit_rows(query_QE, "query") @ unit_rows(gallery_GE, "gallery").T
    scores_QG, order_QG = scores_QG.sort(dim=1, descending=True, stable=True)
    return scores_QG[:, :k], order_QG[:, :k]


def unit_rows(x_NE: Tensor, name: str) -> Tensor:
    """Rows of length one in float64, so that no matmul precision setting moves a rank.

    Raises:
        UserError: a row is zero or not finite.
    """
    # MPS has no float64.
    device = torch.device("cpu") if x_NE.device.type == "mps" else x_NE.device
    x_NE = x_NE.detach().to(device).double()
    bad_N = ~x_NE.isfinite().all(dim=1) | (x_NE == 0).all(dim=1)
    if bad_N.any():
        raise UserError(
            f"{int(bad_N.sum())} of {len(x_NE)} {name} embeddings are zero or not finite "
            f"(first: row {int(bad_N.nonzero()[0])}): the weights or the inputs are damaged, "
            "evaluate an earlier checkpoint"
        )
    return F.normalize(x_NE, dim=1)


def _check(image_NE: Tensor, text_ME: Tensor, owner_M: Tensor, ks: Sequence[int]) -> None:
    if len(image_NE) == 0 or len(text_ME) == 0:
        raise UserError(
            f"retrieval needs images and texts, got {len(image_NE)} images and {len(text_ME)} "
            "texts: check that the split is not empty"
        )
    if image_NE.shape[1] != text_ME.shape[1]:
        raise UserError(
            f"image embeddings have width {image_NE.shape[1]}, text embeddings {text_ME.shape[1]}: "
            "both must come from one contrastive head"
        )
    if len(owner_M) != len(text_ME):
        raise UserError(f"text_to_image has {len(owner_M)} entries for {len(text_ME)} texts")
    if int(owner_M.min()) < 0 or int(owner_M.max()) >= len(image_NE):
        raise UserError(
            f"text_to_image points to rows {int(owner_M.min())}..{int(owner_M.max())}, the images "
            f"are 0..{len(image_NE) - 1}"
        )
    if not ks or min(ks) < 1:
        raise UserError(f"ks={tuple(ks)}: give at least one K, each 1 or more")


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def _median(ranks: Tensor) -> float:
    return ranks.double().quantile(0.5).item()
