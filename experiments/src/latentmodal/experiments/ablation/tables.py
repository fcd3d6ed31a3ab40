"""A comparison as a table: Markdown, CSV, and in the terminal."""

from __future__ import annotations

import csv
from io import StringIO

from rich import box
from rich.markup import escape
from rich.table import Table

from latentmodal.experiments.ablation.comparison import CellSummary, Comparison
from latentmodal.experiments.ablation.wording import (
    headline,
    shown,
    shown_bytes,
    shown_count,
    shown_interval,
    shown_mean,
    shown_seconds,
)

_COSTS = ("trainable", "tokens", "step", "memory")
_COLOURS = {"better": "green", "worse": "red"}


_WIDE = 110
"""Columns of a terminal that has room for what cells cost."""


def markdown(comparison: Comparison) -> str:
    """The headline, a table of the first metric and of what runs cost, one of the other metrics."""
    info = comparison.first
    lines = [headline(comparison), ""]
    header = ["cell", "seeds", info.name, "difference", "95 % interval", "verdict", *_COSTS]
    rows = [
        [
            cell.label,
            str(len(cell.cell.usable)),
            shown_mean(cell, info),
            shown(cell.findings[info.name].difference.value, info, signed=True),
            shown_interval(cell.findings[info.name].difference, info),
            cell.findings[info.name].difference.verdict,
            *costs(cell),
        ]
        for cell in ordered(comparison)
    ]
    lines += [*_markdown_table(header, rows, words=(0, 5)), ""]
    others = list(comparison.metrics.values())[1:]
    if others:
        rows = [
            [
                cell.label,
                *(
                    f"{shown_mean(cell, other)} ({cell.findings[other.name].difference.verdict})"
                    for other in others
                ),
            ]
            for cell in ordered(comparison)
        ]
        lines += [*_markdown_table(["cell", *(other.name for other in others)], rows), ""]
    lines += [f"- not compared: {p.label} seed {p.seed}: {p.reason}" for p in comparison.problems]
    lines += [f"- {note}" for note in comparison.notes]
    lines.append(
        f"- mean ± standard error over seeds; differences to {comparison.reference}, paired by "
        "seed; simultaneous 95 % intervals (Dunnett); shares and scores are 100-fold"
    )
    return "\n".join(lines) + "\n"


def csv_text(comparison: Comparison) -> str:
    """One row for each cell and metric, numbers as they were measured."""
    axes = list(dict.fromkeys(axis for cell in comparison.cells for axis in cell.axes))
    costs_of = (
        *("trainable_parameters", "total_parameters", "steps", "samples", "tokens"),
        *("train_seconds", "step_seconds", "peak_memory_bytes"),
    )
    target = StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(
        [
            *("cell", *axes, "metric", "unit", "better", "seeds", "values", "mean"),
            *("standard_error", "against", "difference", "low", "high", "verdict", *costs_of),
        ]
    )
    for cell in comparison.cells:
        for name, info in comparison.metrics.items():
            finding = cell.findings[name]
            low, high = finding.difference.interval or (None, None)
            writer.writerow(
                [
                    *(cell.label, *(cell.axes.get(axis, "") for axis in axes), name, info.unit),
                    info.better or "neither",
                    " ".join(map(str, finding.values)),
                    " ".join(map(repr, finding.values.values())),
                    *(finding.mean, finding.standard_error, finding.difference.against),
                    *(finding.difference.value, low, high, finding.difference.verdict),
                    *(getattr(cell, cost) for cost in costs_of),
                ]
            )
    return target.getvalue()


def terminal(comparison: Comparison, width: int) -> Table:
    """The table of the first metric, best cell first; a narrow one leaves the costs out."""
    info = comparison.first
    titles = _COSTS if width >= _WIDE else ()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("cell", overflow="fold")
    table.add_column(info.name.replace("/", "/\n", 1), justify="right", no_wrap=True)
    table.add_column("difference\n[dim]95 % interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for cell in ordered(comparison):
        difference = cell.findings[info.name].difference
        value = shown(difference.value, info, signed=True)
        if difference.interval is not None:
            value += f"\n[dim]{shown_interval(difference, info)}"
        colour = _COLOURS.get(difference.verdict)
        seeds = len(cell.cell.usable)
        table.add_row(
            escape(cell.label.replace(",", ",\n")),
            f"[bold]{shown_mean(cell, info)}[/]\n[dim]{seeds} seed{'s' if seeds != 1 else ''}",
            value,
            f"[{colour}]{difference.verdict}" if colour else difference.verdict,
            *costs(cell)[: len(titles)],
        )
    return table


def ordered(comparison: Comparison) -> list[CellSummary]:
    """Every cell, best first, those without a value last."""
    ranked = comparison.ranked()
    return [*ranked, *(cell for cell in comparison.cells if cell not in ranked)]


def costs(cell: CellSummary) -> list[str]:
    """What its runs took: trainable parameters, tokens, a step's time, memory."""
    return [
        shown_count(cell.trainable_parameters),
        shown_count(cell.tokens),
        shown_seconds(cell.step_seconds),
        shown_bytes(cell.peak_memory_bytes),
    ]


def _markdown_table(
    header: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)
) -> list[str]:
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    escaped = [[text.replace("|", "\\|") for text in row] for row in (header, *rows)]
    return [f"| {' | '.join(row)} |" for row in (escaped[0], rule, *escaped[1:])]
