"""Whether cells differ by more than their seeds do.

Cells times seeds is a randomized block design: a value is the effect of its cell, plus that of its
seed (which gives every cell the same data order and the same first weights), plus noise. Least
squares takes both effects out, also where runs are missing; what is left gives one variance of the
noise, pooled over all cells (Montgomery, Design and Analysis of Experiments, chapter 4). It is
assumed to be the same in each.

Many comparisons at 5 % each would find a difference somewhere by chance alone. The intervals are
therefore simultaneous: the chance that any of a family misses the truth is 5 % in all.

Legend: N runs, C cells, S seeds, P effects, K contrasts of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

import numpy as np
import scipy.stats
from scipy.optimize import brentq

Better = Literal["higher", "lower"]
Verdict = Literal[
    "better", "worse", "different", "not distinguishable", "reference",
    "one seed", "no common seed", "no value",
]  # fmt: skip
Values = Mapping[str, Mapping[int, float]]
"""Of one metric: cell -> seed -> value."""

CONFIDENCE: Final = 0.95
_ROUNDING: Final = 1e-9
"""Differences below this share of the largest value are rounding."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A cell minus another one, by the least-squares fit; paired where both have every seed.

    `interval` is simultaneous over the family it was asked in. It and the standard error are None
    where nothing is left to estimate the noise from (`one seed`), all of them where the two share
    no seed, not even through other cells, or one has no value.
    """

    cell: str
    against: str
    verdict: Verdict
    value: float | None = None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class BlockFit:
    """Effects of cells and seeds on one metric.

    Attributes:
        cells: those with a value, in order.
        effects_P: of the cells, then of the seeds.
        design_NP: which effects each value is made of.
        sigma: standard deviation of the noise; 0.0 without any.
        degrees: degrees of freedom left for it: (C-1)(S-1) where no run is missing.
        rounding: differences up to this are none.
    """

    cells: tuple[str, ...]
    effects_P: np.ndarray
    design_NP: np.ndarray
    sigma: float
    degrees: int
    rounding: float

    def contrasts(self, pairs: Sequence[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Differences (K) of pairs of cells, and their covariances (K, K) for noise of variance 1.

        A difference that the runs say nothing of is NaN.
        """
        contrasts_KP = np.zeros((len(pairs), len(self.effects_P)))
        for row, (cell, other) in enumerate(pairs):
            contrasts_KP[row, self.cells.index(cell)] += 1
            contrasts_KP[row, self.cells.index(other)] -= 1
        inverse_PN = np.linalg.pinv(self.design_NP)
        known_KP = contrasts_KP @ inverse_PN @ self.design_NP
        differences_K = contrasts_KP @ self.effects_P
        differences_K[~np.isclose(known_KP, contrasts_KP, atol=1e-8).all(axis=1)] = np.nan
        weights_KN = contrasts_KP @ inverse_PN
        return differences_K, weights_KN @ weights_KN.T


def fit_blocks(values: Values) -> BlockFit | None:
    """Least squares of cell and seed effects; None without any value."""
    cells = tuple(cell for cell, own in values.items() if own)
    if not cells:
        return None
    seeds = sorted({seed for own in values.values() for seed in own})
    rows = [(cell, seed) for cell in cells for seed in values[cell]]
    values_N = np.array([values[cell][seed] for cell, seed in rows], dtype=float)
    design_NP = np.zeros((len(rows), len(cells) + len(seeds)))
    for row, (cell, seed) in enumerate(rows):
        design_NP[row, [cells.index(cell), len(cells) + seeds.index(seed)]] = 1
    effects_P = np.linalg.pinv(design_NP) @ values_N
    degrees = len(rows) - int(np.linalg.matrix_rank(design_NP))
    rounding = _ROUNDING * float(np.abs(values_N).max())
    residuals_N = values_N - design_NP @ effects_P
    sigma = float(np.sqrt(residuals_N @ residuals_N / degrees)) if degrees else 0.0
    if sigma <= rounding:
        sigma = 0.0
    return BlockFit(cells, effects_P, design_NP, sigma, degrees, rounding)


def compare_with(
    values: Values, reference: str, better: Better | None, confidence: float = CONFIDENCE
) -> dict[str, Difference]:
    """Every cell against `reference`, by Dunnett's two-sided procedure.

    The critical value is the `confidence` quantile of the largest |t| of the family, from the
    multivariate t distribution (`scipy.stats.multivariate_t`, on which `scipy.stats.dunnett` is
    built) with the correlations of the fit's differences: 1/2 throughout where no run is missing.

    Args:
        values: of one metric.
        reference: the cell the others are compared with.
        better: which values are; None where neither are, and then a verdict is at most `different`.
        confidence: that all intervals hold the true difference.

    Returns:
        A difference for every other cell; that of the reference has the verdict `reference`.
    """
    others = [(cell, reference) for cell in values if cell != reference]
    found = {
        difference.cell: difference
        for difference in _family(values, others, better, confidence, _dunnett_quantile)
    }
    own = Difference(cell=reference, against=reference, verdict="reference")
    return {cell: found.get(cell, own) for cell in values}


def all_pairs(
    values: Values, better: Better | None, confidence: float = CONFIDENCE
) -> list[Difference]:
    """Each cell against each cell before it, by Tukey's procedure (the studentized range).

    Where runs are missing this is the Tukey-Kramer interval, which is wider than needed.
    """
    cells = list(values)
    pairs = [(cell, other) for row, cell in enumerate(cells) for other in cells[:row]]
    return _family(values, pairs, better, confidence, _tukey_quantile)


def mean_and_error(values: Mapping[int, float]) -> tuple[float | None, float | None]:
    """The mean over seeds and its standard error, from these values alone; None for too few."""
    if not values:
        return None, None
    values_S = np.array(list(values.values()), dtype=float)
    error = values_S.std(ddof=1) / np.sqrt(len(values_S)) if len(values_S) > 1 else None
    return float(values_S.mean()), None if error is None else float(error)


def _family(
    values: Values,
    pairs: Sequence[tuple[str, str]],
    better: Better | None,
    confidence: float,
    quantile: Callable[[BlockFit, np.ndarray, float], float],
) -> list[Difference]:
    """The differences of these pairs, with intervals that hold together."""
    fit = fit_blocks(values)
    has_value = [pair for pair in pairs if values[pair[0]] and values[pair[1]]]
    if fit is None or not has_value:
        return [Difference(cell=cell, against=other, verdict="no value") for cell, other in pairs]
    differences_K, covariance_KK = fit.contrasts(has_value)
    known_K = np.isfinite(differences_K)
    critical = 0.0
    if fit.sigma and known_K.any():
        critical = quantile(fit, covariance_KK[np.ix_(known_K, known_K)], confidence)
    errors_K = fit.sigma * np.sqrt(np.diag(covariance_KK))
    place = {pair: row for row, pair in enumerate(has_value)}
    found = []
    for cell, other in pairs:
        row = place.get((cell, other))
        if row is None:
            found.append(Difference(cell=cell, against=other, verdict="no value"))
        elif not known_K[row]:
            found.append(Difference(cell=cell, against=other, verdict="no common seed"))
        else:
            value, error = float(differences_K[row]), float(errors_K[row])
            found.append(_judged(cell, other, value, error, critical * error, fit, better))
    return found


def _judged(
    cell: str,
    other: str,
    value: float,
    error: float,
    reach: float,
    fit: BlockFit,
    better: Better | None,
) -> Difference:
    """A difference whose interval reaches so far to both sides, with its verdict."""
    if not fit.degrees:
        return Difference(cell=cell, against=other, value=value, verdict="one seed")
    verdict: Verdict
    if abs(value) <= max(reach, fit.rounding):
        verdict = "not distinguishable"
    elif better is None:
        verdict = "different"
    else:
        verdict = "better" if (value > 0) == (better == "higher") else "worse"
    return Difference(
        cell=cell,
        against=other,
        value=value,
        standard_error=error,
        interval=(value - reach, value + reach),
        verdict=verdict,
    )


def _dunnett_quantile(fit: BlockFit, covariance_KK: np.ndarray, confidence: float) -> float:
    scale_K = np.sqrt(np.diag(covariance_KK))
    correlation_KK = np.round(covariance_KK / np.outer(scale_K, scale_K), 9)
    return _largest_t(tuple(map(tuple, correlation_KK.tolist())), fit.degrees, confidence)


@cache
def _largest_t(
    correlation: tuple[tuple[float, ...], ...], degrees: int, confidence: float
) -> float:
    """c with P(max |T| <= c) = confidence; the same for every metric that all runs have."""
    one = float(scipy.stats.t.ppf((1 + confidence) / 2, degrees))
    if len(correlation) == 1:
        return one

    def missed(critical: float) -> float:
        bound_K = np.full(len(correlation), critical)
        # The integral is by quasi-random points; the same ones each time make it a function.
        inside = scipy.stats.multivariate_t.cdf(
            bound_K, shape=correlation, df=degrees, lower_limit=-bound_K, random_state=0
        )
        return float(inside) - confidence

    bonferroni = float(scipy.stats.t.ppf(1 - (1 - confidence) / (2 * len(correlation)), degrees))
    # The truth lies between; the integral's own error may reach past either end.
    return float(brentq(missed, 0.95 * one, 1.05 * bonferroni, xtol=1e-4))


def _tukey_quantile(fit: BlockFit, covariance_KK: np.ndarray, confidence: float) -> float:
    del covariance_KK  # the studentized range knows equal variances only: Tukey-Kramer
    return _widest_range(len(fit.cells), fit.degrees, confidence) / float(np.sqrt(2))


@cache
def _widest_range(cells: int, degrees: int, confidence: float) -> float:
    return float(scipy.stats.studentized_range.ppf(confidence, cells, degrees))
