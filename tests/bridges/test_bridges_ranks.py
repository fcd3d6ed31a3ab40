"""On 2, 3 and 4 ranks: averaged loss and gradients are those of the full batch in one process."""

import math
from typing import Any

import pytest
import torch

Results = dict[int, dict[str, Any]]
WORLDS = (2, 3, 4)
CASES = [
    "info_nce",
    "info_nce-ids",
    "info_nce-smooth0.1",
    "info_nce-ids-smooth0.1",
    "sigmoid",
    "sigmoid-ids",
]


def assert_equals_reference(results: Results, world: int, case: str, reference: str) -> None:
    found, expected = results[world][case], results[1][reference]
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_reference_has_something_to_compare(rank_results: Results) -> None:
    for case in CASES:
        expected = rank_results[1][case]
        assert len(expected) == 10
        unused = {"head.logit_bias"} if case.startswith("info_nce") else set()
        for name, value in expected.items():
            assert (value.abs().max() > 1e-3) != (name in unused), (case, name)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_averaging_gives_full_batch(rank_results: Results, world: int, case: str) -> None:
    assert_equals_reference(rank_results, world, case, case)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["info_nce", "sigmoid-ids"])
def test_fsdp2_gives_full_batch_and_clamps(rank_results: Results, world: int, case: str) -> None:
    assert_equals_reference(rank_results, world, f"{case}-fsdp", case)
    clamped = rank_results[world][f"{case}-fsdp"]["clamped"]
    torch.testing.assert_close(clamped, torch.full((1,), math.log(100), dtype=torch.float64))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["sigmoid", "sigmoid-ids"])
def test_chunks_of_a_block_change_nothing(rank_results: Results, world: int, case: str) -> None:
    assert_equals_reference(rank_results, world, f"{case}-chunked", case)


@pytest.mark.parametrize("case", ["info_nce-ids", "sigmoid-ids"])
def test_subgroup_is_its_own_batch(rank_results: Results, case: str) -> None:
    assert_equals_reference(rank_results, 4, f"{case}-group", case)


@pytest.mark.parametrize("world", WORLDS)
def test_head_initialises_after_sharding(rank_results: Results, world: int) -> None:
    values = rank_results[world]["materialised"]
    torch.testing.assert_close(
        values["logit_scale"], torch.full((1,), math.log(1 / 0.07), dtype=torch.float64)
    )
    assert values["logit_bias"].tolist() == [-2.0]
    assert values["text_proj.bias"].tolist() == [0.0] * 6
    assert 0.2 < values["image_proj.weight"].std() * math.sqrt(7) < 2


def test_sigmoid_memory_does_not_grow_with_ranks(rank_results: Results) -> None:
    features = 2 * 8 * 6  # image and text rows of one rank
    assert [rank_results[w]["kept"] for w in (1, *WORLDS)] == [features + 2] * 4


@pytest.mark.parametrize("world", WORLDS)
def test_unequal_batches_are_named(rank_results: Results, world: int) -> None:
    messages = rank_results[world]["unequal"]
    assert len(messages) == 3
    for message in messages:
        assert f"rank {world - 1}: [[3, 2]" in message
        assert "dropping the last incomplete batch" in message
