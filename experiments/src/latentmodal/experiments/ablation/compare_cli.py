"""`latentmodal compare`: trained runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="folders of runs, or above them")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="section/metric of eval.json, again for more; the first decides"),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="LABEL", help="the cell all others are compared with")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="folder for report.html, table.md, table.csv, tensorboard/")
    ] = Path("comparison"),
) -> None:
    """Say which cells differ by more than their seeds do, and write a report."""
    from latentmodal.experiments.ablation.summary import compare_runs
    from latentmodal.experiments.ablation.tables import terminal
    from latentmodal.experiments.ablation.wording import headline

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width; 80 columns would cut tables
    comparison = compare_runs(runs, metrics=metric, against=against, out=out)
    console.print(headline(comparison), markup=False, highlight=False)
    console.print(terminal(comparison, console.width))
    for problem in comparison.problems:
        line = f"not compared: {problem.label} seed {problem.seed}: {problem.reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for note in comparison.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for title, name in (("report", "report.html"), ("board", "tensorboard")):
        console.print(f"{title:<12}{out / name}", markup=False, highlight=False, soft_wrap=True)
