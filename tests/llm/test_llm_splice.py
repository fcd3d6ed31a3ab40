"""splice_soft_tokens against a plain loop, its gradients, and the errors that name a sample."""

import pytest
import torch
from torch import Tensor, nn

from latentmodal.llm import splice_soft_tokens

# Samples of 7 positions: two pictures, none, one at the very end.
SLOTS = ([1, 2, 4, 5], [], [5, 6])
WIDTH = 3


@pytest.fixture
def embeds_BTE() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def slot_mask_BT() -> Tensor:
    mask_BT = torch.zeros(3, 7, dtype=torch.bool)
    for sample, positions in enumerate(SLOTS):
        mask_BT[sample, positions] = True
    return mask_BT


@pytest.fixture
def soft_KME() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


def naive(embeds_BTE: Tensor, soft_SE: Tensor) -> Tensor:
    rows = iter(soft_SE)
    samples = [
        torch.stack([next(rows) if t in SLOTS[b] else e for t, e in enumerate(embeds_TE)])
        for b, embeds_TE in enumerate(embeds_BTE)
    ]
    return torch.stack(samples)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("slot_counts", [None, [4, 0, 2]])
def test_equals_the_loop_with_gradients(embeds_BTE, slot_mask_BT, soft_KME, as_list, slot_counts):
    soft = list(soft_KME) if as_list else soft_KME
    spliced = splice_soft_tokens(
        embeds_BTE, slot_mask_BT, soft, slot_counts=slot_counts, image_counts=[2, 0, 1]
    )
    expected = naive(embeds_BTE, soft_KME.flatten(0, 1))
    torch.testing.assert_close(spliced, expected, rtol=0, atol=0)

    weight_BTE = torch.randn_like(expected)
    inputs = (embeds_BTE, soft_KME)
    got = torch.autograd.grad((spliced * weight_BTE).sum(), inputs)
    want = torch.autograd.grad((expected * weight_BTE).sum(), inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_pictures_of_different_length(embeds_BTE, slot_mask_BT, soft_KME):
    soft_SE = soft_KME.flatten(0, 1)
    spliced = splice_soft_tokens(
        embeds_BTE, slot_mask_BT, [soft_SE[:1], soft_SE[1:4], soft_SE[4:]], image_counts=[2, 0, 1]
    )
    torch.testing.assert_close(spliced, naive(embeds_BTE, soft_SE), rtol=0, atol=0)


def test_soft_tokens_take_the_embeddings_dtype(embeds_BTE, slot_mask_BT, soft_KME):
    spliced = splice_soft_tokens(
        embeds_BTE.bfloat16(), slot_mask_BT, soft_KME, image_counts=[2, 0, 1]
    )
    assert spliced.dtype == torch.bfloat16
    spliced.float().sum().backward()
    torch.testing.assert_close(soft_KME.grad, torch.ones_like(soft_KME))


def test_embeddings_given_are_not_written_to(embeds_BTE, slot_mask_BT, soft_KME):
    before = embeds_BTE.detach().clone()
    splice_soft_tokens(embeds_BTE, slot_mask_BT, soft_KME, image_counts=[2, 0, 1])
    torch.testing.assert_close(embeds_BTE.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("as_list", [False, True])
def test_batch_without_pictures_keeps_the_bridge_in_the_graph(embeds_BTE, as_list):
    bridge = nn.Linear(5, WIDTH).double()
    nothing = bridge(torch.randn(1, 2, 5, dtype=torch.float64))[:0]
    soft = [nothing.flatten(0, 1)] if as_list else nothing
    empty_BT = torch.zeros(3, 7, dtype=torch.bool)
    frozen_BTE = embeds_BTE.detach()
    spliced = splice_soft_tokens(frozen_BTE, empty_BT, soft)
    torch.testing.assert_close(spliced.detach(), frozen_BTE, rtol=0, atol=0)
    spliced.sum().backward()
    for parameter in bridge.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter))


def test_no_pictures_at_all_is_the_identity(embeds_BTE):
    spliced = splice_soft_tokens(embeds_BTE, torch.zeros(3, 7, dtype=torch.bool), [])
    torch.testing.assert_close(spliced, embeds_BTE, rtol=0, atol=0)


def test_mismatch_names_sample_and_both_numbers(embeds_BTE, slot_mask_BT, soft_KME):
    slot_mask_BT[2, 6] = False  # as a cut in the middle of a picture would
    with pytest.raises(ValueError, match="sample 2 has 1 slot positions but 2 soft tokens"):
        splice_soft_tokens(embeds_BTE, slot_mask_BT, soft_KME, image_counts=[2, 0, 1])


def test_missing_picture_names_its_sample(embeds_BTE, slot_mask_BT, soft_KME):
    with pytest.raises(ValueError, match=r"sample 2 has 2 slot positions but 0 soft tokens"):
        splice_soft_tokens(embeds_BTE, slot_mask_BT, soft_KME[:2], image_counts=[2, 0, 1])


def test_total_right_but_spread_wrong_is_refused(embeds_BTE, slot_mask_BT, soft_KME):
    with pytest.raises(ValueError, match="sample 0 has 4 slot positions but 2 soft tokens"):
        splice_soft_tokens(embeds_BTE, slot_mask_BT, soft_KME, image_counts=[1, 1, 1])


def test_one_picture_per_sample_is_the_default(embeds_BTE, soft_KME):
    mask_BT = torch.zeros(3, 7, dtype=torch.bool)
    mask_BT[0, :2] = mask_BT[2, :2] = True
    spliced = splice_soft_tokens(embeds_BTE, mask_BT, soft_KME[:2])
    torch.testing.assert_close(spliced[2, :2], soft_KME[1], rtol=0, atol=0)


def test_left_over_pictures_are_refused(embeds_BTE, slot_mask_BT, soft_KME):
    with pytest.raises(ValueError, match="2 soft tokens are left over"):
        splice_soft_tokens(
            embeds_BTE, slot_mask_BT, torch.cat([soft_KME, soft_KME[:1]]), image_counts=[2, 0, 1]
        )


def test_counts_older_than_the_mask_are_refused(embeds_BTE, slot_mask_BT, soft_KME):
    with pytest.raises(ValueError, match="last cut"):
        splice_soft_tokens(
            embeds_BTE, slot_mask_BT, soft_KME, slot_counts=[2, 2, 2], image_counts=[1, 1, 1]
        )


@pytest.mark.parametrize(
    ("mask_shape", "dtype", "width", "message"),
    [
        ((3, 6), torch.bool, WIDTH, "does not fit"),
        ((3, 7), torch.int64, WIDTH, "torch.bool"),
        ((3, 7), torch.bool, WIDTH + 1, "out_dim=3"),
    ],
)
def test_unfit_shapes(embeds_BTE, mask_shape, dtype, width, message):
    mask = torch.zeros(mask_shape, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        splice_soft_tokens(embeds_BTE, mask, torch.zeros(0, 2, width))


def test_counts_given_means_the_mask_is_not_read(embeds_BTE, slot_mask_BT, soft_KME):
    """On an accelerator nothing may be copied to the host; meta tensors refuse any such copy."""
    spliced = splice_soft_tokens(
        embeds_BTE.detach().to("meta"),
        slot_mask_BT.to("meta"),
        soft_KME.detach().to("meta"),
        slot_counts=[4, 0, 2],
        image_counts=[2, 0, 1],
    )
    assert spliced.shape == (3, 7, WIDTH)
