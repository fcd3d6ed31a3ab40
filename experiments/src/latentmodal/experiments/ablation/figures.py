"""Pictures of a comparison as SVG that takes its colours from the page around it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

_INK, _GRID, _PAPER = "#010203", "#040506", "#070809"
"""Stand-ins in the drawing; the page's own variables take their place."""
_VARIABLES: Final = {_INK: "var(--soft-ink)", _GRID: "var(--line)", _PAPER: "var(--paper)"}

PALETTE: Final = (
    *("#3b82d6", "#e07b2a", "#2f9e6e", "#c94f7c", "#8a63d2", "#b8902a", "#2aa5b8", "#d65c5c"),
    *("#6b8e23", "#7f7f8f"),
)
"""Told apart on light and dark paper alike."""

_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "axes.axisbelow": True,
}

Point = tuple[float, float, float | None, str, str]
"""x, y, standard error of y, colour, and a short text inside the marker."""


def pareto(points: Sequence[Point], *, x_label: str, y_label: str, lower: bool, name: str) -> str:
    """A metric against a price, with the line of cells that no cheaper one reaches.

    Args:
        points: of the cells, best first.
        x_label, y_label: of the axes.
        lower: whether lower values of y are better.
        name: unique on the page.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(3.7, 2.9)
        sign = -1 if lower else 1
        front: list[tuple[float, float]] = []
        for x, y, *_ in sorted(points, key=lambda point: (point[0], -sign * point[1])):
            if not front or sign * y > sign * front[-1][1]:
                front.append((x, y))
        axes.step(*zip(*front, strict=True), where="post", color=_INK, linewidth=1, alpha=0.5)
        for x, y, error, colour, text in reversed(points):  # the best on top
            axes.errorbar(x, y, yerr=error, color=colour, linewidth=1.2, zorder=2)
            axes.plot(x, y, "o", color=colour, markersize=12, markeredgecolor=_PAPER, zorder=3)
            axes.annotate(
                text, (x, y), ha="center", va="center_baseline", color="white", fontsize=8,
                fontweight="bold", zorder=4,
            )  # fmt: skip
        lowest, highest = min(p[0] for p in points), max(p[0] for p in points)
        if lowest > 0 and highest / lowest > 5:
            axes.set_xscale("log")
            _plain_decades(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.12, y=0.15)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, name)


def curves(
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    colours: Mapping[str, str],
    *,
    y_label: str,
    name: str,
    log_scale: bool = False,
) -> str:
    """A number over the steps of training: thin lines for runs, a thick one for a cell's mean.

    Args:
        lines: by cell, the points (step, value) of each run.
        colours: by cell.
        y_label: of the axis.
        name: unique on the page.
        log_scale: whether the axis of the values is logarithmic.
    """
    with rc_context(_STYLE):
        figure, axes = _axes(4.4, 2.9)
        for cell, runs in lines.items():
            by_step: dict[float, list[float]] = {}
            for points in runs:
                axes.plot(*zip(*points, strict=True), color=colours[cell], linewidth=0.6, alpha=0.3)
                for step, value in points:
                    by_step.setdefault(step, []).append(value)
            # A step that some runs lack would make the mean jump.
            mean = [(s, sum(v) / len(v)) for s, v in sorted(by_step.items()) if len(v) == len(runs)]
            if mean:
                axes.plot(
                    *zip(*mean, strict=True), color=colours[cell], linewidth=1.8,
                    marker="o" if len(mean) < 12 else "", markersize=3.5,
                )  # fmt: skip
        if log_scale:
            axes.set_yscale("log")
            _plain_decades(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        return _svg(figure, name)


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _plain_decades(axis: Any) -> None:
    """Few numbers, written out."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, name: str) -> str:
    """The drawing without what only a file needs; ids do not meet those of another drawing."""
    target = StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="(?!p[0-9a-f]{10}|m[0-9a-f]{10})([^"]*)"', rf'id="{name}-\1"', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
