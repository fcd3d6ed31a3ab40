"""The report of a comparison: one HTML file that needs nothing else, a Markdown table and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from latentmodal.experiments.ablation.comparison import CellSummary, Comparison, MetricInfo
from latentmodal.experiments.ablation.curve_data import loss_points, metric_points
from latentmodal.experiments.ablation.figures import PALETTE, curves, pareto
from latentmodal.experiments.ablation.records import shown_value
from latentmodal.experiments.ablation.side_by_side import shared_samples
from latentmodal.experiments.ablation.statistics import Difference
from latentmodal.experiments.ablation.tables import costs, csv_text, markdown, ordered
from latentmodal.experiments.ablation.wording import (
    headline,
    shown,
    shown_interval,
    shown_mean,
)
from latentmodal.experiments.files import write_text_atomically

_PRICES: Final = {
    "step_seconds": ("milliseconds per step", 1e3),
    "trainable_parameters": ("trainable parameters, millions", 1e-6),
    "tokens": ("tokens read in training, thousands", 1e-3),
}
_MARKS: Final = {"better": "▲", "worse": "▼", "different": "≠", "not distinguishable": "≈"}
_CURVES: Final = 3
"""Metrics whose learning curves are drawn, besides the loss."""
_REMEDY = "free space or choose another --out"


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write report.html, table.md and table.csv.

    Raises:
        UserError: a run's samples or curves are broken, or the disk refuses.
    """
    write_text_atomically(folder / "report.html", html(comparison), _REMEDY)
    write_text_atomically(folder / "table.md", markdown(comparison), _REMEDY)
    write_text_atomically(folder / "table.csv", csv_text(comparison), _REMEDY)


def html(comparison: Comparison) -> str:
    """The page; no part of it is fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("latentmodal.experiments.ablation", "report_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cells = ordered(comparison)
    colours = _colours(comparison.cells)
    numbers = {cell.label: number for number, cell in enumerate(cells, 1)}
    page = environment.get_template("report.html.j2")
    return page.render(
        comparison=comparison,
        headline=headline(comparison),
        facts=_facts(comparison),
        cells=cells,
        colours=colours,
        numbers=numbers,
        main=_main_rows(cells, comparison.first),
        others=[info for info in comparison.metrics.values() if info is not comparison.first],
        paretos=_paretos(comparison, colours, numbers),
        curves=_curve_pictures(comparison, colours),
        matrix=_matrix(comparison, cells),
        samples=shared_samples(cells),
        recipes=_recipes(comparison, cells),
        marks=_MARKS,
        shown_mean=shown_mean,
        costs=costs,
    )


@dataclass(frozen=True)
class _Row:
    """A line of the main table; places are per cent of the width of a bar."""

    cell: CellSummary
    mean: str
    difference: str
    interval: str
    verdict: str
    dots: list[float]
    bar: tuple[float, float] | None
    point: float | None
    zero: float


def _main_rows(cells: Sequence[CellSummary], info: MetricInfo) -> list[_Row]:
    values = [v for cell in cells for v in cell.findings[info.name].values.values()]
    differences = [cell.findings[info.name].difference for cell in cells]
    ends = [end for difference in differences for end in difference.interval or ()]
    ends += [difference.value for difference in differences if difference.value is not None]
    place, where = _scale([*values]), _scale([*ends, 0.0])
    rows = []
    for cell, difference in zip(cells, differences, strict=True):
        bar = difference.interval and (where(difference.interval[0]), where(difference.interval[1]))
        rows.append(
            _Row(
                cell=cell,
                mean=shown_mean(cell, info),
                difference=shown(difference.value, info, signed=True),
                interval=shown_interval(difference, info),
                verdict=difference.verdict,
                dots=[place(value) for value in cell.findings[info.name].values.values()],
                bar=bar,
                point=None if difference.value is None else where(difference.value),
                zero=where(0.0),
            )
        )
    return rows


def _scale(values: Sequence[float]) -> Any:
    """A map of these values to 3 … 97 per cent."""
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    span = high - low
    return lambda value: 50.0 if span == 0 else 3 + 94 * (value - low) / span


def _colours(cells: Sequence[CellSummary]) -> dict[str, str]:
    return {cell.label: PALETTE[row % len(PALETTE)] for row, cell in enumerate(cells)}


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = sum(len(cell.cell.usable) for cell in comparison.cells)
    seeds = ", ".join(map(str, comparison.seeds))
    return [
        ("metric", comparison.first.name),
        ("reference", comparison.reference),
        (
            "budget of each run",
            comparison.budget or ("not equal" if comparison.knows_costs else "not known"),
        ),
        ("runs", f"{len(comparison.cells)} cells, {runs} runs compared, seeds {seeds}"),
    ]


def _paretos(
    comparison: Comparison, colours: dict[str, str], numbers: dict[str, int]
) -> list[Markup]:
    info = comparison.first
    pictures = []
    for price, (x_label, factor) in _PRICES.items():
        points = []
        for cell in comparison.ranked():
            amount, finding = getattr(cell, price), cell.findings[info.name]
            if amount is None or finding.mean is None:
                continue
            error = finding.standard_error
            points.append(
                (
                    amount * factor,
                    finding.mean * info.factor,
                    None if error is None else error * info.factor,
                    colours[cell.label],
                    str(numbers[cell.label]),
                )
            )
        if len({point[0] for point in points}) > 1:
            lower = info.better == "lower"
            drawn = pareto(points, x_label=x_label, y_label=info.name, lower=lower, name=price)
            pictures.append(Markup(drawn))
    return pictures


def _curve_pictures(comparison: Comparison, colours: dict[str, str]) -> list[Markup]:
    names = list(comparison.metrics)[:_CURVES]
    metrics: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
    losses: dict[str, list[Any]] = {}
    for cell in comparison.cells:
        for run in cell.cell.usable:
            for name, points in metric_points(run, names).items():
                if len(points) > 1:
                    scaled = [(s, v * comparison.metrics[name].factor) for s, v in points]
                    metrics[name].setdefault(cell.label, []).append(scaled)
            if loss := loss_points(run):
                losses.setdefault(cell.label, []).append(loss)
    drawn = [
        curves(lines, colours, y_label=name, name=f"curve{number}")
        for number, (name, lines) in enumerate(metrics.items())
        if lines
    ]
    if losses:
        label = "training loss"
        drawn.append(curves(losses, colours, y_label=label, name="loss", log_scale=True))
    return [Markup(picture) for picture in drawn]


def _matrix(comparison: Comparison, cells: Sequence[CellSummary]) -> list[list[dict[str, str]]]:
    """By row and column, what the row's cell is to the column's."""
    info = comparison.first
    rows = []
    for cell in cells:
        row = []
        for other in cells:
            pair = comparison.pair(info.name, cell.label, other.label)
            row.append(_seen_from(cell.label, pair, info) if pair and cell is not other else {})
        rows.append(row)
    return rows


def _seen_from(label: str, pair: Difference, info: MetricInfo) -> dict[str, str]:
    verdict, value = str(pair.verdict), pair.value
    interval = pair.interval
    if pair.cell != label:
        verdict = {"better": "worse", "worse": "better"}.get(verdict, verdict)
        value = None if value is None else -value
        interval = interval and (-interval[1], -interval[0])
    turned = Difference(
        cell=label, against="", verdict=pair.verdict, value=value, interval=interval
    )
    return {
        "verdict": verdict,
        "value": shown(value, info, signed=True),
        "interval": shown_interval(turned, info),
    }


def _recipes(comparison: Comparison, cells: Sequence[CellSummary]) -> list[tuple[str, list[str]]]:
    """Each key that differs, and its value in each cell."""
    return [
        (
            key,
            [
                shown_value(cell.cell.runs[0].keys[key]) if key in cell.cell.runs[0].keys else ""
                for cell in cells
            ],
        )
        for key in comparison.differing
        if key != "name"
    ]
