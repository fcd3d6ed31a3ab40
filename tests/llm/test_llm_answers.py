"""answer_loss against the full computation of all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.llm import IGNORE_INDEX, answer_loss

VOCABULARY, WIDTH = 11, 6


@pytest.fixture
def lm_head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=False).double()


@pytest.fixture
def hidden_BTD() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels_BT() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(VOCABULARY, (3, 8), generator=generator)
    unlabelled = torch.rand(3, 8, generator=generator) < 0.6
    labels[unlabelled] = IGNORE_INDEX
    labels[0, 0] = 4  # nothing precedes it, so it must not count
    return labels


def full(hidden_BTD: Tensor, lm_head: nn.Module, labels_BT: Tensor) -> Tensor:
    logits_BTV = lm_head(hidden_BTD)[:, :-1]
    return F.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


@pytest.mark.parametrize("counted", [False, True])
def test_equals_full_logits_with_gradients(hidden_BTD, lm_head, labels_BT, counted):
    num_targets = int((labels_BT[:, 1:] != IGNORE_INDEX).sum()) if counted else None
    loss = answer_loss(hidden_BTD, lm_head, labels_BT, num_targets=num_targets)
    expected = full(hidden_BTD, lm_head, labels_BT)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    inputs = (hidden_BTD, lm_head.weight)
    got, want = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_head_sees_only_labelled_positions(hidden_BTD, lm_head, labels_BT):
    seen: list[torch.Size] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(hidden.shape)
        return lm_head(hidden)

    answer_loss(hidden_BTD, head, labels_BT)
    assert seen == [(int((labels_BT[:, 1:] != IGNORE_INDEX).sum()), WIDTH)]


def test_half_precision_takes_the_softmax_in_float32(hidden_BTD, lm_head, labels_BT):
    loss = answer_loss(hidden_BTD.bfloat16(), lm_head.bfloat16(), labels_BT)
    assert loss.dtype == torch.float32


def test_no_labels_is_zero_and_attached(hidden_BTD, lm_head):
    loss = answer_loss(hidden_BTD, lm_head, torch.full((3, 8), IGNORE_INDEX))
    assert loss.item() == 0.0
    loss.backward()
    torch.testing.assert_close(hidden_BTD.grad, torch.zeros_like(hidden_BTD))
    torch.testing.assert_close(lm_head.weight.grad, torch.zeros_like(lm_head.weight))


def test_count_given_means_labels_are_not_read(hidden_BTD, lm_head, labels_BT):
    """On an accelerator nothing may be copied to the host; meta tensors refuse any such copy."""
    head = nn.Linear(WIDTH, VOCABULARY, device="meta")
    hidden = torch.empty(3, 8, WIDTH, device="meta")
    assert answer_loss(hidden, head, labels_BT.to("meta"), num_targets=5).shape == ()
