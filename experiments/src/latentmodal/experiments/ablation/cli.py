"""`latentmodal ablate`: run an ablation, or show what it would run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from latentmodal.experiments.ablation.config import AblationConfig
    from latentmodal.experiments.ablation.costs import CellCost
    from latentmodal.experiments.ablation.expand import Change, Plan, PlannedCell

_INTERRUPTED = 130


def ablate(
    file: Annotated[
        str, typer.Argument(help="a shipped ablation such as bridges_emoji, or a file")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="override keys of the file: budget.steps=20"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show cells, costs and changes; train nothing")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="where to keep it (default: the file's `folder`)")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="cells at a time")] = None,
) -> None:
    """Run cells over seeds at an equal budget, then compare them; go on where it was stopped."""
    from latentmodal.experiments.ablation.config import read_ablation
    from latentmodal.experiments.ablation.run import ablate as run_ablation

    keys = list(overrides or [])
    keys += [f"folder={folder}"] if folder is not None else []
    keys += [f"workers.count={workers}"] if workers is not None else []
    config = read_ablation(file, keys)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width; 80 columns would cut tables
    try:
        if dry_run:
            if show(config, console):
                raise typer.Exit(1)
            return
        failed = run_ablation(config, console=console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on in {config.path}", soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    for job in failed:
        console.print(
            f"failed: {job.cell.label} seed {job.seed}: {escape(str(job.failure))}",
            highlight=False,
            soft_wrap=True,
        )
    if failed:
        console.print(f"{len(failed)} runs failed; the same command tries them again")
        raise typer.Exit(1)


def show(config: AblationConfig, console: Console) -> list[str]:
    """Print the cells, what each costs and how it differs from the base; costs are measured.

    Returns:
        Labels of the cells that cannot be trained, each printed with its reason.
    """
    from latentmodal.experiments.ablation.expand import expand
    from latentmodal.experiments.ablation.folder import AblationFolder
    from latentmodal.experiments.ablation.run import measured_costs
    from latentmodal.experiments.ablation.workers import build_engine

    plan = expand(config)
    folder = AblationFolder(config.path)
    with folder.lock():
        folder.check(config)
        engine = build_engine(config.workers, folder.path)
        costs = measured_costs(plan, config, folder, engine, console)
    jobs = folder.jobs(config, plan.cells)
    console.print(f"base        {config.base}")
    for change in plan.common:
        console.print(f"  every cell {_change(change)}", highlight=False)
    console.print(_table(config, plan, costs))
    reasons = folder.costs.reasons()
    failed = [cell.label for cell in plan.cells if cell.label not in costs]
    for label in failed:
        reason = escape(reasons.get(label, "could not be measured"))
        console.print(f"failed: {label}: {reason}", highlight=False)
    todo = [job.cell.label for job in jobs if not job.done and job.cell.label in costs]
    hours = (
        sum(_run_seconds(config, costs[label], label) for label in todo)
        / config.workers.count
        / 3600
    )
    console.print(
        f"{len(plan.cells)} cells x {len(config.seeds)} seeds = {len(jobs)} runs, {len(todo)} to "
        f"do: {hours:.2f} h of training with {config.workers.count} workers, evaluation aside"
    )
    return failed


def _table(config: AblationConfig, plan: Plan, costs: dict[str, CellCost]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold")
    for title in ("trainable", "tokens/step", "GFLOP/step", "s/step", "steps", "min/run"):
        table.add_column(title, justify="right")
    table.add_column("differs from the base in", overflow="fold")
    for cell in plan.cells:
        own = [_change(change) for change in cell.changes if change not in plan.common]
        table.add_row(
            escape(cell.label) + (" (reference)" if cell is plan.reference else ""),
            *_cost_columns(config, cell, costs),
            "\n".join(own) or "nothing",
        )
    return table


def _cost_columns(
    config: AblationConfig, cell: PlannedCell, costs: dict[str, CellCost]
) -> list[str]:
    from latentmodal.experiments.ablation.budget import steps_for

    cost = costs.get(cell.label)
    if cost is None:
        return ["-"] * 6
    steps = steps_for(config.budget, cost, cell.label)
    tokens = "-" if cost.tokens_per_step is None else f"{cost.tokens_per_step:.0f}"
    return [
        f"{cost.trainable_parameters:,}",
        tokens,
        f"{cost.flops_per_step / 1e9:.3g}",
        f"{cost.step_seconds:.3g}",
        str(steps),
        f"{steps * cost.step_seconds / 60:.1f}",
    ]


def _run_seconds(config: AblationConfig, cost: CellCost, label: str) -> float:
    from latentmodal.experiments.ablation.budget import steps_for

    return steps_for(config.budget, cost, label) * cost.step_seconds


def _change(change: Change) -> str:
    from latentmodal.experiments.ablation.records import shown_value

    key, old, new = change
    if isinstance(new, dict) and "name" in new:
        fields = ", ".join(f"{k}={shown_value(v)}" for k, v in new.items() if k != "name")
        return escape(f"{key}: {shown_value(old)} -> {new['name']} ({fields})")
    return escape(f"{key}: {shown_value(old)} -> {shown_value(new)}")
