"""BLIP-2's objectives: on 2, 3 and 4 ranks as in one process; the draw of negatives; refusals."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentmodal.bridges.losses import (
    global_mean,
    grounded_generation,
    image_text_contrastive,
    image_text_matching,
    sample_hard_negatives,
)

Results = dict[int, dict[str, Any]]
WORLDS = (2, 3, 4)
PAIRS = 12
IDS = torch.tensor([7, 1, 2, 3, 3, 7, 6, 8, 7, 9, 10, 11])
SCRIPT = Path(__file__).with_name("blip2_rank_cases.py")

USES = {
    "itc": ("patches", "image", "text", "temperature"),
    "itm": ("patches", "verdict"),
    "itg": ("hidden", "words"),
    "mean": ("temperature",),
}
CASES = [
    "itc", "itc-smooth", "itc-ids", "itc-ids-smooth", "itm", "itm-one-image", "itg", "itg-counted",
    "mean",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    done = subprocess.run(
        [sys.executable, SCRIPT, out],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: Results = torch.load(out)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_the_mathematics(results: Results, case: str) -> None:
    assert_same(results[1][case], results[0][case])
    used = USES[case.split("-")[0]]
    for name, value in results[0][case].items():
        expected = name == "loss" or name.startswith(used)
        assert (value.abs().max() > 1e-4) == expected, name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_full_batch(results: Results, world: int, case: str) -> None:
    assert_same(results[world][case], results[1][case])


@pytest.mark.parametrize("case", ["itc-ids-smooth", "itm", "itg"])
def test_subgroup_is_its_own_batch(results: Results, case: str) -> None:
    assert_same(results[4][f"{case}-group"], results[1][case])


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_draw_the_negatives_of_one_process(results: Results, world: int) -> None:
    for side in ("text", "image"):
        drawn = results[world]["itm"][side]
        assert drawn.dtype == torch.int64 and torch.equal(drawn, results[1]["itm"][side])
        assert (IDS[drawn] != IDS).all()
    assert not torch.equal(results[world]["itm"]["text"], results[world]["itm"]["image"])


@pytest.mark.parametrize("world", (1, *WORLDS))
def test_batch_of_one_image_counts_true_pairs_only(results: Results, world: int) -> None:
    assert results[world]["itm-one-image"]["valid"].tolist() == [[True, False, False]] * PAIRS
    assert results[world]["itm"]["valid"].all()


WANTED: dict[str, Callable[[int], list[int]]] = {
    "mixed": lambda me: [(5 * k + 3 * me + 1) % PAIRS for k in range(7)],
    "repeated": lambda me: [me, 11, 11, 0, me, 11],
    "one": lambda me: [PAIRS - 1 - me],
}


def pixels() -> Tensor:
    return torch.randn(PAIRS, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [*WANTED, "own"])
def test_fetched_rows_arrive_and_their_gradients_go_home(
    results: Results, world: int, case: str
) -> None:
    rows = pixels()
    got, grad = [], torch.zeros_like(rows)
    for me in range(world):
        wanted = [PAIRS // world * me] * 2 if case == "own" else WANTED[case](me)
        weight = torch.arange(1.0, 1 + len(wanted) * 20, dtype=rows.dtype).view(-1, 5, 4)
        got.append(rows[wanted])
        for place, row in enumerate(wanted):
            grad[row] += weight[place] * (me + 1)
    found = results[world][f"fetch-{case}"]
    assert torch.equal(found["got"], torch.cat(got))
    torch.testing.assert_close(found["grad"], grad)


@pytest.mark.parametrize("world", WORLDS)
def test_only_wanted_rows_travel(results: Results, world: int) -> None:
    """A gather brings (W - 1) * B rows to every rank, fetching at most the B that it drew."""
    local = PAIRS // world
    for me in results[world]["traffic"]:
        row = me["row"]
        places = 8 * local * (world - 1)  # one int64 of every pair elsewhere, the only overhead
        assert me["wanted"] == local
        assert me["gather"] >= (world - 1) * local * row
        assert me["fetch"] == me["foreign"] * row + places
        assert me["fetch"] <= local * row + places
        assert me["gather_backward"] == (world - 1) * local * row
    # Whoever was asked gets the gradients back: the same rows, all ranks together.
    total = {key: sum(me[key] for me in results[world]["traffic"]) for key in me}
    assert total["fetch_backward"] == total["foreign"] * row
    assert 0 < total["fetch"] <= total["gather"] / (world - 1) * 1.001
    assert total["fetch_backward"] <= total["gather_backward"] / (world - 1)


def chi_square(counts: Tensor, probability: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom over all cells that can be drawn."""
    expected = probability * counts.sum(dim=1, keepdim=True)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    return statistic, int(possible.sum()) - len(counts)


def drawn_counts(logits: Tensor, ids: Tensor, draws: int) -> Tensor:
    counts = torch.zeros_like(logits)
    for seed in range(draws):
        index = sample_hard_negatives(logits, ids, seed=seed).index_B
        counts[torch.arange(len(logits)), index] += 1
    return counts


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_negatives_follow_softmax_of_similarity(scale: float) -> None:
    ids = torch.tensor([4, 1, 4, 2, 3, 2])
    logits = scale * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    right = ids[:, None] == ids[None, :]
    probability = logits.masked_fill(right, -torch.inf).softmax(dim=1)
    if scale == 0:
        assert probability.unique().tolist() == pytest.approx([0, 0.2, 0.25])
    counts = drawn_counts(logits, ids, draws=3000)
    statistic, freedom = chi_square(counts, probability)
    # Mean and variance of a chi-square are f and 2 f: five standard deviations.
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    # The bound is tight enough to tell a distribution that is slightly off.
    off = logits + 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    statistic, _ = chi_square(counts, off.masked_fill(right, -torch.inf).softmax(dim=1))
    assert statistic - freedom > 50 * (2 * freedom) ** 0.5


def test_negatives_depend_on_seed_and_row_alone() -> None:
    logits, ids = torch.zeros(64, 64), torch.arange(64)
    first = sample_hard_negatives(logits, ids, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first.index_B, sample_hard_negatives(logits, ids, seed=1).index_B)
    assert (first.index_B != sample_hard_negatives(logits, ids, seed=2).index_B).sum() > 50
    assert len(first.index_B.unique()) > 25  # rows draw apart from one another
    state = torch.get_rng_state()
    sample_hard_negatives(logits, ids, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("logit", [-1e4, 0.0, 1e4])
def test_no_positive_is_drawn_however_likely(logit: float) -> None:
    ids = torch.tensor([0, 0, 0, 0, 0, 1])
    logits = torch.where(ids[:, None] == ids[None, :], logit, 0.0)
    for seed in range(50):
        index_B, valid_B = sample_hard_negatives(logits, ids, seed=seed)
        assert valid_B.all() and (ids[index_B] != ids).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_row_without_negative_is_invalid(rows: int) -> None:
    index_B, valid_B = sample_hard_negatives(
        torch.randn(rows, rows), torch.full((rows,), 5), seed=0
    )
    assert not valid_B.any()
    assert ((index_B >= 0) & (index_B < rows)).all()  # safe to look up all the same


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_smoothed_shared_targets() -> None:
    """0.9 of the target over the pairs of one image, 0.1 over all."""
    ids = torch.tensor([3, 5, 3, 3, 8])
    result = image_text_contrastive(
        units(5, 2, 4), units(5, 4, seed=1), torch.tensor(0.2), ids_B=ids
    )
    same = (ids[:, None] == ids[None, :]).double()
    target = 0.9 * same / same.sum(dim=1, keepdim=True) + 0.1 / 5
    expected = sum(
        -(target * logits.log_softmax(dim=1)).sum(dim=1).mean() / 2
        for logits in (result.image_to_text_BN, result.text_to_image_BN)
    )
    torch.testing.assert_close(result.loss, expected)
    assert torch.equal(result.image_to_text_BN, result.text_to_image_BN.T)


def test_distinct_ids_are_no_ids() -> None:
    inputs = units(5, 2, 4), units(5, 4, seed=1), torch.tensor([0.2])
    for smoothing in (0.0, 0.1):
        with_ids, without = (
            image_text_contrastive(*inputs, ids_B=ids, label_smoothing=smoothing).loss
            for ids in (torch.tensor([9, 2, 7, 0, 4]), None)
        )
        torch.testing.assert_close(with_ids, without)


def test_the_nearest_query_counts() -> None:
    image, text = units(1, 3, 4), units(1, 4, seed=1)
    image[0, 1] = text[0]
    result = image_text_contrastive(image, text, torch.tensor(0.5))
    torch.testing.assert_close(result.image_to_text_BN.item(), 2.0)


def test_maths_is_in_float32_under_autocast() -> None:
    image, text = units(6, 2, 4).bfloat16(), units(6, 4, seed=1).bfloat16()
    expected = image_text_contrastive(image.float(), text.float(), torch.tensor(0.07))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = image_text_contrastive(image, text, torch.tensor(0.07))
        matched = image_text_matching(torch.ones(2, 2).bfloat16(), torch.tensor([0, 1]))
    assert found.loss.dtype == found.image_to_text_BN.dtype == matched.dtype == torch.float32
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(
    ("image", "text", "ids", "smoothing", "message"),
    [
        ((4, 3), (4, 3), None, 0.1, r"image has shape \(4, 3\) and text \(4, 3\)"),
        ((4, 2, 3), (5, 3), None, 0.1, r"must be \(pairs, queries, embed_dim\)"),
        ((4, 2, 3), (4, 2), None, 0.1, r"text \(4, 2\)"),
        ((4, 2, 3), (4, 3), torch.zeros(4), 0.1, "ids_B is torch.float32 of shape"),
        ((4, 2, 3), (4, 3), torch.arange(3), 0.1, r"must be int64 of shape \(4,\)"),
        ((4, 2, 3), (4, 3), None, 1.0, r"label_smoothing is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_contrastive_refuses(
    image: tuple[int, ...],
    text: tuple[int, ...],
    ids: Tensor | None,
    smoothing: float,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        image_text_contrastive(
            torch.ones(image), torch.ones(text), torch.ones(1), ids_B=ids, label_smoothing=smoothing
        )


def test_matching_leaves_invalid_rows_out() -> None:
    logits = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels, valid = torch.tensor([1, 1, 0, 0, 0]), torch.tensor([True, True, False, True, False])
    loss = image_text_matching(logits, labels, valid)
    torch.testing.assert_close(loss, F.cross_entropy(logits[valid], labels[valid]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[valid] != 0).all() and (grad[~valid] == 0).all()
    torch.testing.assert_close(image_text_matching(logits, labels), F.cross_entropy(logits, labels))
    nothing = image_text_matching(logits, labels, torch.zeros(5, dtype=torch.bool))
    (grad,) = torch.autograd.grad(nothing, logits)
    assert nothing == 0 and (grad == 0).all()


def test_generation_predicts_every_token_but_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 4, generator=generator).requires_grad_()
    table = torch.randn(11, 4, generator=generator)
    ids = torch.randint(0, 11, (3, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    shapes: list[tuple[int, ...]] = []

    def head(rows_AD: Tensor) -> Tensor:
        shapes.append(tuple(rows_AD.shape))
        return rows_AD @ table.T

    loss = grounded_generation(hidden, head, ids, mask)
    logits = (hidden @ table.T)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100).flatten()
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))
    assert shapes == [(6, 4)]  # four words of the first text, none of the second, two of the third
    (grad,) = torch.autograd.grad(loss, hidden)
    predicts = F.pad(mask[:, 1:], (0, 1), value=False)
    assert torch.equal(grad.abs().sum(dim=2) > 0, predicts)

    other = torch.where(mask, ids, 3)
    other[:, 0] = 9
    torch.testing.assert_close(grounded_generation(hidden, head, other, mask), loss)
    counted = grounded_generation(hidden, head, ids, mask, num_targets=6)
    assert torch.equal(counted, loss)


def test_generation_without_a_single_target_is_zero() -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, False, False]] * 2)
    loss = grounded_generation(hidden, torch.nn.Linear(4, 5), torch.ones(2, 3).long(), mask)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and (hidden.grad == 0).all()


def test_global_mean_of_nothing_is_zero() -> None:
    total = torch.zeros((), requires_grad=True)
    mean = global_mean(total, torch.tensor(0))
    mean.backward()
    assert mean == 0 and total.grad is not None and total.grad.isfinite()
