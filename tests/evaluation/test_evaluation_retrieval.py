"""Recall against torchmetrics and a plain sort; ties, collapse, chance, and damaged inputs."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.retrieval import RetrievalHitRate

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.retrieval import (
    chance_any_of,
    retrieval_metrics,
    top_k,
)


def hit_rate(scores_QG: torch.Tensor, target_QG: torch.Tensor, k: int) -> float:
    queries = torch.arange(len(scores_QG))[:, None].expand_as(scores_QG)
    metric = RetrievalHitRate(top_k=k)
    return metric(scores_QG.flatten(), target_QG.flatten(), queries.flatten()).item()


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_equals_torchmetrics(chunk):
    generator = torch.Generator().manual_seed(0)
    owner_M = torch.randint(40, (150,), generator=generator)
    owner_M[:40] = torch.arange(40)
    image_NE = torch.randn(40, 8, generator=generator)
    text_ME = image_NE[owner_M] + 1.5 * torch.randn(150, 8, generator=generator)
    result = retrieval_metrics(image_NE, text_ME, owner_M, ks=(1, 5, 10), chunk=chunk)

    scores_NM = F.normalize(image_NE, dim=1) @ F.normalize(text_ME, dim=1).T
    own_NM = torch.arange(40)[:, None] == owner_M[None]
    for k in (1, 5, 10):
        assert result.image_to_text[k] == pytest.approx(hit_rate(scores_NM, own_NM, k), abs=1e-6)
        assert result.text_to_image[k] == pytest.approx(
            hit_rate(scores_NM.T, own_NM.T, k), abs=1e-6
        )
    ranks_M = 1 + (scores_NM > scores_NM[owner_M, torch.arange(150)]).sum(0)
    assert result.median_rank_text_to_image == ranks_M.double().quantile(0.5)
    assert 0 < result.text_to_image[1] < result.text_to_image[10] < 1


@pytest.mark.parametrize("chunk", [2, 2048])
def test_best_of_several_embeddings_counts(chunk):
    """Against the whole (N, V, M) of cosines at once."""
    generator = torch.Generator().manual_seed(0)
    owner_M = torch.randint(20, (70,), generator=generator)
    owner_M[:20] = torch.arange(20)
    image_NVE = torch.randn(20, 4, 8, generator=generator)
    text_ME = image_NVE[owner_M, 2] + 1.5 * torch.randn(70, 8, generator=generator)
    result = retrieval_metrics(image_NVE, text_ME, owner_M, ks=(1, 5), chunk=chunk)

    unit_NVE, unit_ME = F.normalize(image_NVE, dim=-1), F.normalize(text_ME, dim=-1)
    scores_NM = torch.einsum("nve,me->nvm", unit_NVE, unit_ME).amax(1)
    own_NM = torch.arange(20)[:, None] == owner_M[None]
    for k in (1, 5):
        assert result.image_to_text[k] == pytest.approx(hit_rate(scores_NM, own_NM, k), abs=1e-6)
        assert result.text_to_image[k] == pytest.approx(
            hit_rate(scores_NM.T, own_NM.T, k), abs=1e-6
        )
    assert 0 < result.text_to_image[1] < result.text_to_image[5] < 1
    best, rows = top_k(text_ME[:3], image_NVE, 2)
    assert rows.tolist() == scores_NM.T[:3].topk(2).indices.tolist()
    torch.testing.assert_close(best.float(), scores_NM.T[:3].topk(2).values)
    assert top_k(image_NVE[:3], text_ME, 2)[1].tolist() == scores_NM[:3].topk(2).indices.tolist()


def test_one_of_several_is_the_same_as_one(gallery):
    """A second embedding that is a copy changes nothing, ties included."""
    images_NVE = gallery.image_NE[:, None].expand(-1, 2, -1)
    assert retrieval_metrics(
        images_NVE, gallery.text_ME, gallery.text_to_image_M
    ) == retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M)
    points = torch.ones(20, 3, 5)
    collapsed = retrieval_metrics(points, points[:, 0], torch.arange(20))
    assert collapsed.image_to_text == collapsed.text_to_image == {1: 0.0, 5: 0.0, 10: 0.0}


def test_one_damaged_embedding_of_several_is_an_error(gallery):
    images_NVE = gallery.image_NE[:, None].repeat(1, 2, 1)
    images_NVE[4, 1] = torch.nan
    with pytest.raises(UserError, match=r"1 of 7 image embeddings .*row 4"):
        retrieval_metrics(images_NVE, gallery.text_ME, gallery.text_to_image_M)


def test_length_of_embeddings_does_not_matter(gallery):
    scale_M1 = torch.arange(1.0, 10.0)[:, None]
    plain = retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M)
    scaled = retrieval_metrics(
        gallery.image_NE * 7, gallery.text_ME * scale_M1, gallery.text_to_image_M
    )
    assert plain == scaled


def test_perfect_model_and_its_captions_do_not_compete():
    """Equal captions of one picture are no ties: the picture has found one of its own."""
    owner_M = torch.arange(4).repeat_interleave(3)
    image_NE = torch.eye(4)
    result = retrieval_metrics(image_NE, image_NE[owner_M], owner_M, ks=(1,))
    assert result.image_to_text == result.text_to_image == {1: 1.0}
    assert result.median_rank_image_to_text == result.median_rank_text_to_image == 1


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_collapsed_model_scores_nothing(noise):
    generator = torch.Generator().manual_seed(0)
    points = torch.ones(20, 5) + noise * torch.randn(20, 5, generator=generator)
    result = retrieval_metrics(points, points.flip(0), torch.arange(20))
    assert result.image_to_text == result.text_to_image == {1: 0.0, 5: 0.0, 10: 0.0}
    assert result.median_rank_image_to_text == 20


def test_a_single_tie_counts_against():
    image_NE = torch.eye(3)
    text_ME = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    result = retrieval_metrics(image_NE, text_ME, torch.arange(3), ks=(1, 2))
    assert result.text_to_image == {1: pytest.approx(2 / 3), 2: 1.0}
    assert result.image_to_text == {1: 1.0, 2: 1.0}


def test_picture_without_caption_is_only_a_distractor(gallery):
    result = retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M)
    assert (result.num_images, result.num_texts, result.num_queries) == (7, 9, 6)
    assert result.chance_text_to_image[1] == pytest.approx(1 / 7)


def test_k_beyond_the_gallery_is_certain_and_says_so(gallery):
    result = retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M, ks=(50,))
    assert result.image_to_text == result.chance_image_to_text == {50: 1.0}
    assert result.text_to_image == result.chance_text_to_image == {50: 1.0}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_chance_is_the_share_of_all_draws(k):
    owner = [0, 0, 1, 1, 1, 2]
    draws = list(combinations(range(6), k))
    expected = sum(
        sum(any(owner[text] == image for text in draw) for draw in draws) / len(draws)
        for image in range(3)
    )
    captions_N = torch.tensor([2, 3, 1, 0])  # the last has none and does not count
    assert chance_any_of(captions_N, 6, k) == pytest.approx(expected / 3)


def test_chance_at_coco_size_is_finite():
    assert chance_any_of(torch.full((5000,), 5), 25_000, 10) == pytest.approx(0.002, rel=0.01)


def test_top_k_is_sorted_and_cut_to_the_gallery():
    scores, rows = top_k(torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), k=5)
    assert rows.tolist() == [[1, 0]]
    assert scores[0, 0] > scores[0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("side", ["image", "text"])
def test_damaged_embeddings_are_an_error(gallery, value, side):
    damaged = gallery.image_NE if side == "image" else gallery.text_ME
    damaged[2] = value
    with pytest.raises(UserError, match=rf"1 of \d {side} embeddings .*row 2"):
        retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (0, 1)}, "1 or more"),
        ({"ks": ()}, "at least one K"),
        ({"text_to_image_M": torch.full((9,), 7)}, "7..7"),
        ({"text_to_image_M": torch.zeros(3, dtype=torch.long)}, "3 entries for 9"),
        ({"image_NE": torch.zeros(0, 6)}, "0 images"),
        ({"image_NE": torch.ones(7, 4)}, "width 4"),
    ],
)
def test_bad_input_is_named(gallery, change, message):
    given = {
        "image_NE": gallery.image_NE,
        "text_ME": gallery.text_ME,
        "text_to_image_M": gallery.text_to_image_M,
    }
    with pytest.raises(UserError, match=message):
        retrieval_metrics(**(given | change))
