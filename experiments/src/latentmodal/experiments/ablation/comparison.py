"""Cells side by side: what a comparison holds, whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latentmodal.experiments.ablation.records import Cell
from latentmodal.experiments.ablation.statistics import Better, Difference


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """A metric that is compared.

    `better` is None where neither direction is; `unit`, `protocol` and `chance` are a `Metric`'s.
    """

    name: str
    unit: str
    better: Better | None
    protocol: str
    chance: float | None

    @property
    def factor(self) -> float:
        """Shares and scores are shown 100-fold, as papers do."""
        return 100.0 if self.unit in ("share", "score") else 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One metric of one cell.

    Attributes:
        values: by seed.
        mean, standard_error: of these values alone; None for too few.
        difference: to the reference, with the seeds' effects taken out.
    """

    values: dict[int, float]
    mean: float | None
    standard_error: float | None
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class CellSummary:
    """A cell: what it reached, by metric, and what its runs took (mean, median, or most)."""

    cell: Cell
    findings: dict[str, Finding]
    trainable_parameters: int | None
    total_parameters: int | None
    steps: float | None
    samples: float | None
    tokens: float | None
    train_seconds: float | None
    step_seconds: float | None
    peak_memory_bytes: int | None

    @property
    def label(self) -> str:
        """What it is called."""
        return self.cell.label

    @property
    def axes(self) -> dict[str, str]:
        """Its coordinates."""
        return self.cell.axes


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A run that is not compared, and why."""

    label: str
    seed: int
    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cells side by side.

    Attributes:
        name: of the ablation; of the recipes where there is none.
        metrics: by "section/metric"; the first decides.
        reference: label of the cell the others are compared with.
        cells: in the order of their runs, also those without any value.
        pairs: by metric, each cell against each before it.
        problems: runs that failed, are not finished or not evaluated.
        notes: what else a reader must know.
        budget: what each cell was given, in words; None where cells were given different amounts,
            or where that is not known.
        differing: keys of the recipes that are not the same in all cells.
    """

    name: str
    metrics: dict[str, MetricInfo]
    reference: str
    cells: tuple[CellSummary, ...]
    pairs: dict[str, tuple[Difference, ...]]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    budget: str | None
    differing: tuple[str, ...]

    @property
    def first(self) -> MetricInfo:
        """The metric that decides."""
        return next(iter(self.metrics.values()))

    @property
    def knows_costs(self) -> bool:
        """Whether every cell that is compared says what it was given."""
        return all(cell.steps is not None for cell in self.cells if cell.cell.usable)

    @property
    def seeds(self) -> list[int]:
        """Those of all runs that are compared."""
        return sorted({run.seed for cell in self.cells for run in cell.cell.usable})

    def ranked(self, metric: str | None = None) -> list[CellSummary]:
        """Cells with a value of `metric` (the first one's), best first.

        By the difference to the reference, which a missing seed does not distort as it does a
        mean; by means where not every cell can be compared with the reference.
        """
        info = self.metrics[metric or self.first.name]
        known = [cell for cell in self.cells if cell.findings[info.name].mean is not None]
        differences = {
            cell.label: 0.0
            if cell.label == self.reference
            else cell.findings[info.name].difference.value
            for cell in known
        }
        means = {cell.label: cell.findings[info.name].mean for cell in known}
        order = means if None in differences.values() else differences
        return sorted(
            known, key=lambda cell: order[cell.label] or 0.0, reverse=info.better != "lower"
        )

    def pair(self, metric: str, cell: str, other: str) -> Difference | None:
        """The difference of a pair in the order in which it was taken; None for one cell."""
        return next((d for d in self.pairs[metric] if {d.cell, d.against} == {cell, other}), None)
