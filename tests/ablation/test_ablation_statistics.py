"""Verdicts are checked by planted cases, and the numbers against formulas taken elsewhere.

Legend: C cells, S seeds.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from latentmodal.experiments.ablation.directions import better_values
from latentmodal.experiments.ablation.statistics import (
    all_pairs,
    compare_with,
    fit_blocks,
    mean_and_error,
)

CELLS, SEEDS = 8, 3


MISSING = (("c1", 0), ("c2", 2), ("c4", 1), ("c4", 2))


def simulated(
    random: np.random.Generator, missing: bool = False, shift: float = 0.0
) -> dict[str, dict[int, float]]:
    """Eight equal cells with strong effects of the seeds; `shift` is added to the last."""
    values_CS = 5 * random.standard_normal(SEEDS) + random.standard_normal((CELLS, SEEDS))
    values_CS[-1] += shift
    values = {f"c{c}": dict(enumerate(map(float, row))) for c, row in enumerate(values_CS)}
    for cell, seed in MISSING if missing else ():
        del values[cell][seed]
    return values


@pytest.mark.parametrize("missing", [False, True])
def test_identical_cells_are_not_distinguishable(missing: bool) -> None:
    random = np.random.default_rng(0)
    repeats = 1000
    quiet = {"reference": 0, "pairs": 0}
    by_cell = {f"c{c}": 0 for c in range(1, CELLS)}
    for _ in range(repeats):
        values = simulated(random, missing)
        found = compare_with(values, "c0", "higher")
        for cell in by_cell:
            by_cell[cell] += found[cell].verdict == "not distinguishable"
        families = {"reference": [found[c] for c in by_cell], "pairs": all_pairs(values, "higher")}
        assert [len(family) for family in families.values()] == [CELLS - 1, 28]
        for name, family in families.items():
            quiet[name] += all(d.verdict == "not distinguishable" for d in family)
    # Each cell in well over 95 of 100; all of a family at once in 95, here within 3 sigma.
    assert min(by_cell.values()) >= 0.98 * repeats, by_cell
    assert 0.93 * repeats <= min(quiet.values()) and max(quiet.values()) <= 0.975 * repeats, quiet


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    ("shift", "better", "verdict"),
    [
        (-10.0, "higher", "worse"),
        (10.0, "higher", "better"),
        (-10.0, "lower", "better"),
        (10.0, "lower", "worse"),
        (10.0, None, "different"),
    ],
)
def test_a_cell_that_differs_is_found(
    missing: bool, shift: float, better: str | None, verdict: str
) -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        values = simulated(random, missing, shift)
        found = compare_with(values, "c0", better)
        assert found["c7"].verdict == verdict
        assert found["c0"].verdict == "reference"
        assert all_pairs(values, better)[-CELLS + 1].verdict == verdict


def test_complete_blocks_agree_with_the_analysis_of_variance() -> None:
    values = simulated(np.random.default_rng(3))
    values_CS = np.array([list(own.values()) for own in values.values()])
    total = values_CS - values_CS.mean()
    residual_CS = (
        total
        - (values_CS.mean(axis=1, keepdims=True) - values_CS.mean())
        - (values_CS.mean(axis=0, keepdims=True) - values_CS.mean())
    )
    degrees = (CELLS - 1) * (SEEDS - 1)
    variance = (residual_CS**2).sum() / degrees
    fit = fit_blocks(values)
    assert fit is not None
    assert fit.degrees == degrees == 14
    assert fit.sigma**2 == pytest.approx(variance)

    error = np.sqrt(2 * variance / SEEDS)
    for row, difference in enumerate(compare_with(values, "c0", "higher").values()):
        if row == 0:
            continue
        assert difference.value == pytest.approx((values_CS[row] - values_CS[0]).mean())
        assert difference.standard_error == pytest.approx(error)
        # Dunnett 1964, table II: seven cells against one, 14 degrees of freedom, two-sided 5 %.
        assert difference.interval is not None
        reach = (difference.interval[1] - difference.interval[0]) / 2
        assert reach / error == pytest.approx(2.97, abs=0.006)
    for difference in all_pairs(values, "higher"):
        assert difference.interval is not None
        reach = (difference.interval[1] - difference.interval[0]) / 2
        # Studentized range tables: eight means, 14 degrees of freedom: 4.99.
        assert reach == pytest.approx(4.99 * np.sqrt(variance / SEEDS), rel=1e-3)


def test_two_cells_give_the_paired_t_test() -> None:
    values = {"a": {0: 1.0, 1: 2.5, 2: 2.0}, "b": {0: 1.4, 1: 3.3, 2: 2.5}}
    expected = scipy.stats.ttest_rel(list(values["b"].values()), list(values["a"].values()))
    interval = expected.confidence_interval(0.95)
    for found in (compare_with(values, "a", "higher")["b"], all_pairs(values, "higher")[0]):
        assert found.interval == pytest.approx((interval.low, interval.high), rel=1e-4)
        assert found.verdict == "better"


def test_missing_runs_are_filled_by_the_effects_of_their_seeds() -> None:
    # Without noise a cell's missing seed cannot move its difference, however strong the seed.
    values = {
        "a": {0: 0.0, 1: 10.0, 2: 20.0},
        "b": {0: 1.0, 1: 11.0},
        "c": {1: 9.0, 2: 19.0},
    }
    found = compare_with(values, "a", "higher")
    assert found["b"].value == pytest.approx(1)
    assert found["c"].value == pytest.approx(-1)
    assert mean_and_error(values["b"])[0] == 6  # the plain mean is below that of a


def test_missing_runs_agree_with_least_squares_on_other_coordinates() -> None:
    values = simulated(np.random.default_rng(4), missing=True)
    rows = [(c, s, v) for c, own in values.items() for s, v in own.items()]
    # Treatment coding: c0 and seed 0 are the intercept.
    columns = [[1.0] * len(rows)]
    columns += [[float(c == f"c{k}") for c, _, _ in rows] for k in range(1, CELLS)]
    columns += [[float(s == k) for _, s, _ in rows] for k in range(1, SEEDS)]
    design = np.array(columns).T
    measured = np.array([v for _, _, v in rows])
    effects, residual, rank, _ = np.linalg.lstsq(design, measured, rcond=None)
    variance = residual[0] / (len(rows) - rank)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    found = compare_with(values, "c0", "higher")
    for k in range(1, CELLS):
        assert found[f"c{k}"].value == pytest.approx(effects[k])
        assert found[f"c{k}"].standard_error == pytest.approx(errors[k])


def test_one_seed_gives_a_difference_without_an_interval() -> None:
    values = {"a": {0: 1.0}, "b": {0: 5.0}, "c": {0: 3.0}}
    for difference in itertools.chain(
        list(compare_with(values, "a", "higher").values())[1:], all_pairs(values, "higher")
    ):
        assert difference.verdict == "one seed"
        assert difference.interval is None and difference.standard_error is None
        assert difference.value == pytest.approx(
            values[difference.cell][0] - values[difference.against][0]
        )


def test_without_noise_any_difference_is_real_and_none_is_none() -> None:
    seeds = {0: 0.1, 1: 0.7, 2: 0.3}
    values = {
        "a": seeds,
        "same": dict(seeds),
        "less": {seed: value - 0.05 for seed, value in seeds.items()},
        "rounded": {seed: value + 1e-13 for seed, value in seeds.items()},
    }
    found = compare_with(values, "a", "higher")
    verdicts = {cell: difference.verdict for cell, difference in found.items()}
    assert verdicts == {
        "a": "reference", "same": "not distinguishable", "less": "worse",
        "rounded": "not distinguishable",
    }  # fmt: skip
    zeros = {cell: dict.fromkeys(seeds, 0.0) for cell in "ab"}
    assert compare_with(zeros, "a", "higher")["b"].verdict == "not distinguishable"


def test_cells_without_values_or_common_seeds_are_named() -> None:
    values = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.1, 1: 2.3}, "far": {7: 9.0, 8: 9.5}, "none": {}}
    found = compare_with(values, "a", "higher")
    assert found["far"].verdict == "no common seed" and found["far"].value is None
    assert found["none"].verdict == "no value"
    assert found["b"].verdict == "not distinguishable"
    assert {d.verdict for d in compare_with(values, "none", "higher").values()} == {
        "no value",
        "reference",
    }
    assert all(d.verdict == "no value" for d in all_pairs({"a": {}, "b": {}}, "higher"))


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("captions/CIDEr-D", "higher"),
        ("text_to_image_R@1", "higher"),
        ("pairs/text_to_image_median_rank", "lower"),
        ("things/CHAIRi", "lower"),
        ("descriptions/rep-4", "lower"),
        ("descriptions/repeats_4-gram", "lower"),
        ("lm/perplexity", "lower"),
        ("loss/accuracy", "higher"),
        ("pope/yes_ratio", None),
    ],
)
def test_directions(metric: str, better: str | None) -> None:
    assert better_values(metric) == better
