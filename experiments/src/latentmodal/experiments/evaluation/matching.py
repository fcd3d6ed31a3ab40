"""Scores of single pairs by a model that reads picture and text together, and re-ranking by them.

Such a score is too dear for all pairs: the contrastive embeddings choose candidates, and matching
decides among these (Li et al. 2023, arXiv 2301.12597, section 3.1).

Shapes: N images, M texts, E embedding width, P pairs, K candidates, R rows of one call, L feature
tokens, D their width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from latentmodal.bridges.distributed import sum_over_ranks
from latentmodal.experiments.data.loader import gather_objects
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.retrieval import (
    TIE,
    RetrievalResult,
    blocks,
    chance_any_of,
    check_retrieval,
    cosines,
    share,
    unit_rows,
)
from latentmodal.experiments.evaluation.sets import HeldFeatures

PAIR_TIE: Final = 1e-4
"""Logits and log-likelihoods closer than this are equal: they reach some tens, where the rounding
of float32 in batches of different shape moves the fifth digit after the point."""

PairScore = Callable[[Tensor, list[str]], Tensor]
"""Features (R, L, D) and R texts to R scores."""


def pair_score(system: Any, by: str) -> PairScore:
    """The system's own function that scores pairs: for `itm` the logit, for `itg` the likelihood.

    Raises:
        UserError: the system has none, or was trained with the objective switched off.
    """
    if by == "itm":
        score = getattr(system, "match_scores", None)
        head = getattr(getattr(system.model, "head", None), "itm_head", None)
        objective = "image-text matching"
    else:
        score = getattr(system, "caption_scores", None)
        head = getattr(getattr(system.model, "bridge", None), "caption_head", None)
        objective = "grounded generation"
    if score is None or head is None:
        raise UserError(
            f"scoring by {by} needs a system with {objective} "
            f"(system.name=alignment, system.objectives.{by} above 0); this one has none"
        )
    scorer: PairScore = score
    return scorer


def score_pairs(
    score: PairScore,
    held: HeldFeatures,
    image_P: Tensor,
    text_P: Tensor,
    texts: Sequence[str],
    *,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Scores (P,) of image ``image_P[p]`` with text ``text_P[p]``, on every rank, in fp32.

    A pair is scored where its picture's features are, so that these never travel. A collective
    operation: ranks with fewer pairs make as many calls, since each call of a sharded model
    gathers its weights.

    Args:
        score: from `pair_score`.
        held: the features of the set, each rank its share.
        image_P: int64, rows of the set.
        text_P: int64, places in ``texts``.
        texts: what the pairs are made of.
        batch_size: pairs in one call at most.
        device: of the system.

    Raises:
        UserError: a score is not finite.
    """
    place_P = held.place_N[image_P]
    mine_P = (place_P >= 0).nonzero().squeeze(1)
    mine_P = mine_P[place_P[mine_P].argsort(stable=True)]  # a picture is read and moved once
    calls = [mine_P[part] for part in blocks(len(mine_P), batch_size)]
    score_P = torch.zeros(len(image_P))
    for number in range(max(gather_objects(len(calls)))):
        if number >= len(calls):
            score(held.file.rows(torch.tensor([0])).to(device), [texts[0]])
            continue
        call_R = calls[number]
        used, row_R = place_P[call_R].unique_consecutive(return_inverse=True)
        features_RLD = held.file.rows(used).to(device)[row_R.to(device)]
        wanted = [texts[place] for place in text_P[call_R].tolist()]
        score_P[call_R] = score(features_RLD, wanted).float().cpu()
    score_P = sum_over_ranks(score_P.to(device)).cpu()
    if not score_P.isfinite().all():
        raise UserError(
            f"{int((~score_P.isfinite()).sum())} of {len(score_P)} scores of pairs are not finite: "
            "the weights are damaged, evaluate an earlier checkpoint"
        )
    return score_P


class Candidates(NamedTuple):
    """The best by cosine, both ways, best first."""

    text_NK: Tensor
    """int64, texts of each image; K is cut to the number of texts."""
    text_cosine_NK: Tensor
    image_MK: Tensor
    """int64, images of each text; K is cut to the number of images."""
    image_cosine_MK: Tensor


def find_candidates(
    image_NE: Tensor, text_ME: Tensor, owner_M: Tensor, top_k: int, chunk: int = 2048
) -> Candidates:
    """The ``top_k`` texts of every image and images of every text, by cosine.

    At the edge, true pairs give way to false ones that score the same.

    Args:
        image_NE: image embeddings, or (N, V, E) of which the best counts.
        text_ME: text embeddings.
        owner_M: int64, the image of each text.
        top_k: K.
        chunk: scores are made in blocks of ``chunk`` x ``chunk``.
    """
    image_NE, text_ME = unit_rows(image_NE, "image"), unit_rows(text_ME, "text")
    num_images, num_texts = len(image_NE), len(text_ME)
    texts_of = _Best(num_images, min(top_k, num_texts))
    images_of = _Best(num_texts, min(top_k, num_images))
    row_N = torch.arange(num_images)
    for images in blocks(num_images, chunk):
        for texts in blocks(num_texts, chunk):
            own_NM = row_N[images, None] == owner_M[None, texts]
            scores_NM = cosines(image_NE[images], text_ME[texts]) - TIE * own_NM
            texts_of.take(images, scores_NM, texts.start)
            images_of.take(texts, scores_NM.T, images.start)
    own_NK = owner_M[texts_of.index_QK] == row_N[:, None]
    own_MK = images_of.index_QK == owner_M[:, None]
    return Candidates(
        texts_of.index_QK,
        texts_of.score_QK + TIE * own_NK,
        images_of.index_QK,
        images_of.score_QK + TIE * own_MK,
    )


def reranked_metrics(
    image_NE: Tensor,
    text_ME: Tensor,
    owner_M: Tensor,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    ks: Sequence[int] = (1, 5, 10),
    top_k: int = 128,
    chunk: int = 2048,
) -> RetrievalResult:
    """Recall both ways after the ``top_k`` by cosine are ordered by matching logit + cosine.

    As in LAVIS; everything that is no candidate stands below all candidates. Hits and ties are
    those of `retrieval_metrics`: an own caption among the K best is a hit, and ties are lost.

    Args:
        image_NE: image embeddings, or (N, V, E) of which the best counts.
        text_ME: text embeddings.
        owner_M: int64, the image of each text.
        score: images (P,) and texts (P,), as rows, to matching logits (P,); called once.
        ks: the K to report.
        top_k: candidates of an image and of a text.
        chunk: cosines are made in blocks of ``chunk`` x ``chunk`` float64.

    Raises:
        UserError: as `retrieval_metrics`.
    """
    check_retrieval(image_NE, text_ME, owner_M, ks)
    num_images, num_texts = len(image_NE), len(text_ME)
    found = find_candidates(image_NE, text_ME, owner_M, top_k, chunk)
    row_N1, row_M1 = torch.arange(num_images)[:, None], torch.arange(num_texts)[:, None]
    # A pair may be a candidate both ways: it is scored once.
    pair_NK = row_N1 * num_texts + found.text_NK
    pair_MK = found.image_MK * num_texts + row_M1
    pair_P = torch.cat([pair_NK.flatten(), pair_MK.flatten()]).unique()
    logit_P = score(pair_P // num_texts, pair_P % num_texts).double()
    by_text_NK = found.text_cosine_NK + logit_P[torch.searchsorted(pair_P, pair_NK)]
    by_image_MK = found.image_cosine_MK + logit_P[torch.searchsorted(pair_P, pair_MK)]

    captions_N = torch.bincount(owner_M, minlength=num_images)
    rank_of_text_N = _rank(by_text_NK, owner_M[found.text_NK] == row_N1, num_texts - captions_N)
    rank_of_image_M = _rank(
        by_image_MK, found.image_MK == owner_M[:, None], torch.full_like(owner_M, num_images - 1)
    )
    rank_of_text_Q = rank_of_text_N[captions_N > 0]
    return RetrievalResult(
        image_to_text={k: share(rank_of_text_Q <= k) for k in ks},
        text_to_image={k: share(rank_of_image_M <= k) for k in ks},
        chance_image_to_text={k: chance_any_of(captions_N, num_texts, k) for k in ks},
        chance_text_to_image={k: min(k / num_images, 1.0) for k in ks},
        median_rank_image_to_text=rank_of_text_Q.double().quantile(0.5).item(),
        median_rank_text_to_image=rank_of_image_M.double().quantile(0.5).item(),
        num_images=num_images,
        num_texts=num_texts,
        num_queries=len(rank_of_text_Q),
    )


def _rank(score_QK: Tensor, own_QK: Tensor, foreign_Q: Tensor) -> Tensor:
    """One plus the foreign candidates at least as good as the best own one; else the last place."""
    best_own_Q1 = score_QK.masked_fill(~own_QK, -torch.inf).amax(dim=1, keepdim=True)
    beaten_by_Q = ((score_QK >= best_own_Q1 - PAIR_TIE) & ~own_QK).sum(dim=1)
    return 1 + torch.where(own_QK.any(dim=1), beaten_by_Q, foreign_Q)


class _Best:
    """The K best of each query, over blocks that come one after the other."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.score_QK = torch.full((queries, k), -torch.inf, dtype=torch.float64)
        self.index_QK = torch.zeros(queries, k, dtype=torch.int64)

    def take(self, rows: slice, score_QG: Tensor, first: int) -> None:
        """Scores of some queries with the part of the gallery that begins at ``first``."""
        index_QG = torch.arange(first, first + score_QG.shape[1]).expand(len(score_QG), -1)
        both_QX = torch.cat([self.score_QK[rows], score_QG.cpu()], dim=1)
        self.score_QK[rows], place_QK = both_QX.topk(self.k, dim=1)
        self.index_QK[rows] = torch.cat([self.index_QK[rows], index_QG], dim=1).gather(1, place_QK)
