"""Laying out prompts: slots expanded, answers labelled, padding on either side."""

import pytest
import torch

from latentmodal.llm import (
    IGNORE_INDEX,
    IMAGE,
    IMAGE_SLOT,
    Answer,
    Prompt,
    answer_labels,
    collate_prompts,
    expand_slots,
)

X = IGNORE_INDEX


def encode(text: str) -> list[int]:
    return [ord(letter) - ord("a") + 10 for letter in text]


def test_expand_slots_moves_ids_mask_and_spans():
    ids = [1, IMAGE_SLOT, 5, IMAGE_SLOT, 6, 7]
    expanded = expand_slots(ids, [2, 3], placeholder_id=9, spans=[(2, 3), (4, 6)])
    assert expanded.ids == [1, 9, 9, 5, 9, 9, 9, 6, 7]
    assert expanded.slot_mask == [False, True, True, False, True, True, True, False, False]
    assert [expanded.ids[start:stop] for start, stop in expanded.spans] == [[5], [6, 7]]


def test_one_number_serves_every_picture():
    assert expand_slots([IMAGE_SLOT, 3, IMAGE_SLOT], 2).ids == [0, 0, 3, 0, 0]


@pytest.mark.parametrize(
    ("counts", "spans", "message"),
    [
        ([2, 2], (), "2 entries for 1 slots"),
        ([0], (), "at least 1"),
        (2, [(0, 2)], "holds an image slot"),
        (2, [(2, 9)], "not within"),
        (2, [(3, 2)], "not within"),
    ],
)
def test_expand_slots_refuses(counts, spans, message):
    with pytest.raises(ValueError, match=message):
        expand_slots([1, IMAGE_SLOT, 5], counts, spans=spans)


def test_answer_labels_only_inside_spans():
    assert answer_labels([4, 5, 6, 7], [(1, 2), (3, 4)]) == [X, 5, X, 7]
    with pytest.raises(ValueError, match="not within"):
        answer_labels([4, 5], [(1, 3)])


def test_lay_out_a_conversation():
    prompt = Prompt(((1,), "a", IMAGE, "b", Answer("cd"), Answer((2,)), "e", Answer("f")))
    sample = prompt.lay_out(encode, num_tokens_per_image=2, placeholder_id=3)
    assert sample.ids == [1, 10, 3, 3, 11, 12, 13, 2, 14, 15]
    assert sample.slot_mask == [False, False, True, True, *[False] * 6]
    assert sample.labels == [X, X, X, X, X, 12, 13, 2, X, 15]
    assert sample.num_images == 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_counts(side):
    with_picture = Prompt(("a", IMAGE, Answer("bc"))).lay_out(encode, 3)
    text_only = Prompt((Answer("d"), "e")).lay_out(encode, 3)
    batch = collate_prompts([with_picture, text_only], pad_id=7, side=side)
    assert batch.ids_BT.shape == (2, 6)
    assert batch.slot_counts == batch.slot_mask_BT.sum(1).tolist() == [3, 0]
    assert batch.image_counts == [1, 0]
    # Where padding goes decides whether a first label has a position before it to predict it.
    assert batch.num_targets == (3 if side == "left" else 2)
    row = slice(4, 6) if side == "left" else slice(0, 2)
    assert batch.ids_BT[1, row].tolist() == [13, 14]
    assert batch.mask_BT[1].sum() == 2
    assert batch.mask_BT[1, row].all()
    assert batch.labels_BT[1][batch.mask_BT[1]].tolist() == [13, X]
    assert (batch.ids_BT[~batch.mask_BT] == 7).all()
    assert (batch.labels_BT[~batch.mask_BT] == X).all()
    assert batch.ids_BT.dtype == torch.int64
