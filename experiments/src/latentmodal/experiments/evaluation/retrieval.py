"""Recall at K in both directions, with several captions per image and ties against the model.

Images may have one embedding each, (N, E), or several, (N, V, E), of which the best counts: BLIP-2
has one for each query of its Q-Former.

Shapes: N images, V embeddings of an image, M texts, E embedding width, Q queries, G gallery,
K results of a query, P pairs.
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
        image_NE: image embeddings, of any length but zero; or (N, V, E).
        text_ME: text embeddings.
        text_to_image_M: int64, the row of ``image_NE`` each text describes.
        ks: the K to report.
        chunk: scores are made in blocks of ``chunk`` x ``chunk`` float64.

    Raises:
        UserError: nothing to score, a K below 1, a reference outside the images, or embeddings
            that are zero or not finite.
    """
    check_retrieval(image_NE, text_ME, text_to_image_M, ks)
    image_NE, text_ME = unit_rows(image_NE, "image"), unit_rows(text_ME, "text")
    owner_M = text_to_image_M.to(text_ME.device)
    num_images, num_texts = len(image_NE), len(text_ME)

    own_M = torch.cat(
        [
            paired_cosines(image_NE[owner_M[part]], text_ME[part])
            for part in blocks(num_texts, chunk)
        ]
    )
    best_own_N = own_M.new_full((num_images,), -torch.inf)
    best_own_N = best_own_N.scatter_reduce(0, owner_M, own_M, reduce="amax")
    rank_of_text_N = owner_M.new_ones(num_images)
    rank_of_image_M = owner_M.new_ones(num_texts)
    row_N = torch.arange(num_images, device=owner_M.device)
    for images in blocks(num_images, chunk):
        for texts in blocks(num_texts, chunk):
            scores_NM = cosines(image_NE[images], text_ME[texts])
            foreign_NM = row_N[images, None] != owner_M[None, texts]
            beats_image = (scores_NM >= best_own_N[images, None] - TIE) & foreign_NM
            beats_text = (scores_NM >= own_M[None, texts] - TIE) & foreign_NM
            rank_of_text_N[images] += beats_image.sum(dim=1)
            rank_of_image_M[texts] += beats_text.sum(dim=0)

    captions_N = torch.bincount(owner_M, minlength=num_images)
    rank_of_text_Q = rank_of_text_N[captions_N > 0]
    return RetrievalResult(
        image_to_text={k: share(rank_of_text_Q <= k) for k in ks},
        text_to_image={k: share(rank_of_image_M <= k) for k in ks},
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

    Either side may have several embeddings each. K is cut to the size of the gallery; equal scores
    keep the gallery's order.
    """
    query_QE, gallery_GE = unit_rows(query_QE, "query"), unit_rows(gallery_GE, "gallery")
    if gallery_GE.dim() == 3:
        scores_QG = cosines(gallery_GE, query_QE).T
    else:
        scores_QG = cosines(query_QE, gallery_GE)
    scores_QG, order_QG = scores_QG.sort(dim=1, descending=True, stable=True)
    return scores_QG[:, :k], order_QG[:, :k]


def cosines(image_NE: Tensor, text_ME: Tensor) -> Tensor:
    """(N, M) of unit rows: of an image with several embeddings, (N, V, E), the best."""
    if image_NE.dim() == 2:
        return image_NE @ text_ME.T
    best_NM = image_NE[:, 0] @ text_ME.T
    for one_NE in image_NE.unbind(dim=1)[1:]:  # one by one: V times the scores would not fit
        torch.maximum(best_NM, one_NE @ text_ME.T, out=best_NM)
    return best_NM


def paired_cosines(image_PE: Tensor, text_PE: Tensor) -> Tensor:
    """(P,) of unit rows, image p with text p: the diagonal of `cosines`."""
    if image_PE.dim() == 2:
        return (image_PE * text_PE).sum(dim=1)
    return (image_PE * text_PE[:, None]).sum(dim=2).amax(dim=1)


def unit_rows(x_NE: Tensor, name: str) -> Tensor:
    """Embeddings, (N, E) or (N, V, E), of length one along the last dimension.

    In float64, so that no matmul precision setting moves a rank.

    Raises:
        UserError: an embedding is zero or not finite.
    """
    # MPS has no float64.
    device = torch.device("cpu") if x_NE.device.type == "mps" else x_NE.device
    x_NE = x_NE.detach().to(device).double()
    bad_N = ~x_NE.isfinite().all(dim=-1) | (x_NE == 0).all(dim=-1)
    if x_NE.dim() == 3:
        bad_N = bad_N.any(dim=1)
    if bad_N.any():
        raise UserError(
            f"{int(bad_N.sum())} of {len(x_NE)} {name} embeddings are zero or not finite "
            f"(first: row {int(bad_N.nonzero()[0])}): the weights or the inputs are damaged, "
            "evaluate an earlier checkpoint"
        )
    return F.normalize(x_NE, dim=-1)


def check_retrieval(image_NE: Tensor, text_ME: Tensor, owner_M: Tensor, ks: Sequence[int]) -> None:
    """Raise `UserError` unless there is something to score and all of it fits together."""
    if len(image_NE) == 0 or len(text_ME) == 0:
        raise UserError(
            f"retrieval needs images and texts, got {len(image_NE)} images and {len(text_ME)} "
            "texts: check that the split is not empty"
        )
    if image_NE.shape[-1] != text_ME.shape[1]:
        raise UserError(
            f"image embeddings have width {image_NE.shape[-1]}, "
            f"text embeddings {text_ME.shape[1]}: both must come from one contrastive head"
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


def blocks(total: int, size: int) -> list[slice]:
    """Slices of at most ``size`` that cover ``total`` rows."""
    return [slice(start, start + size) for start in range(0, total, size)]


def share(hits: Tensor) -> float:
    """The share of True."""
    return hits.double().mean().item()


def _median(ranks: Tensor) -> float:
    return ranks.double().quantile(0.5).item()
