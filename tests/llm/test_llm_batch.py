"""Batches move as a whole, and the loss divides by what it is told."""

import pytest
import torch

from latentmodal.llm import (
    IGNORE_INDEX,
    PromptTemplate,
    PromptWriter,
    answer_loss,
    target_loss,
)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_all_tensors_move_and_nothing_else_changes(tokenizer, kind):
    writer = PromptWriter(PromptTemplate(), tokenizer, kind, 2)
    batch = writer.train([{"answer": "the cat"}, {"answer": "dog"}], [0, 0])
    moved = batch.to("meta", non_blocking=True)
    assert type(moved) is type(batch)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).is_meta and not value.is_meta
        else:
            assert getattr(moved, name) == value


@pytest.mark.gpu
def test_pinned():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from latentmodal.llm import Answer, Prompt, collate_prompts

    sample = Prompt((Answer((1, 2)),)).lay_out(lambda text: [], 1)
    pinned = collate_prompts([sample], pad_id=0).pin_memory()
    assert pinned.ids_BT.is_pinned() and pinned.to("cuda", non_blocking=True).mask_BT.is_cuda


def test_shared_denominator_makes_ranks_agree_with_the_whole():
    """Two ranks with unequal numbers of targets: the mean of their losses is the full batch's."""
    hidden = torch.randn(4, 6, 8, dtype=torch.float64)
    head = torch.nn.Linear(8, 11, dtype=torch.float64)
    labels = torch.randint(0, 11, (4, 6))
    labels[0, :4] = labels[1, 1:] = labels[3, :2] = IGNORE_INDEX
    whole = answer_loss(hidden, head, labels)
    total = int((labels[:, 1:] != IGNORE_INDEX).sum())
    shared = torch.tensor(total / 2)
    ranks = [
        answer_loss(hidden[rows], head, labels[rows], denominator=shared)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(ranks) / 2, whole)


def test_target_loss_does_not_shift():
    hidden = torch.randn(2, 3, 5)
    head = torch.nn.Linear(5, 7)
    targets = torch.tensor([[1, IGNORE_INDEX, 3], [4, 5, 6]])
    expected = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(target_loss(hidden, head, targets), expected)
    torch.testing.assert_close(target_loss(hidden, head, targets, num_targets=5), expected)
