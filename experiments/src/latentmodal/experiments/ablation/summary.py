"""What many runs show: per cell and metric a mean, a difference, an interval and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from latentmodal.experiments.ablation.comparison import (
    CellSummary,
    Comparison,
    Finding,
    MetricInfo,
    Problem,
)
from latentmodal.experiments.ablation.config import MEASURES
from latentmodal.experiments.ablation.directions import better_values
from latentmodal.experiments.ablation.records import (
    Cell,
    RunRecord,
    cells_of,
    differing_keys,
    find_runs,
    read_run,
    shown_value,
)
from latentmodal.experiments.ablation.statistics import (
    Difference,
    all_pairs,
    compare_with,
    mean_and_error,
)
from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.report import Metric


def compare_runs(
    folders: Sequence[Path],
    *,
    metrics: Sequence[str] | None = None,
    against: str | None = None,
    out: Path | None = None,
    board: Path | None = None,
) -> Comparison:
    """Compare the runs in (or below) some folders and write what was found.

    Args:
        folders: of runs, or above them.
        metrics: "section/metric" of `eval.json`, the first decides; those of the ablation the runs
            are of, else all that every run has.
        against: label of the cell that all are compared with; that of the ablation, or the first.
        out: folder for report.html, table.md and table.csv; nothing is written without one.
        board: folder for TensorBoard; `out`/tensorboard where None.

    Raises:
        UserError: a folder without runs, a broken file, an unknown metric or cell, no run to
            compare, or a disk that refuses.
    """
    comparison = summarize(
        [read_run(folder) for folder in find_runs(folders)], metrics=metrics, against=against
    )
    if out is not None:
        from latentmodal.experiments.ablation.report import write_report
        from latentmodal.experiments.ablation.tensorboard import write_board

        write_board(comparison, board or out / "tensorboard")  # refuses before anything is written
        write_report(comparison, out)
    return comparison


def summarize(
    records: Sequence[RunRecord],
    *,
    metrics: Sequence[str] | None = None,
    against: str | None = None,
) -> Comparison:
    """The comparison of these runs; see `compare_runs`."""
    cells = cells_of(records)
    usable = [run for cell in cells for run in cell.usable]
    problems = tuple(
        Problem(label=cell.label, seed=run.seed, path=run.path, reason=run.problem)
        for cell in cells
        for run in cell.runs
        if run.problem is not None
    )
    if not usable:
        first = problems[0]
        raise UserError(f"no run to compare; the first: {first.path}: {first.reason}")
    plan = _ablation_of(records)
    infos = {name: _info(name, usable) for name in _chosen(metrics or plan.get("metrics"), usable)}
    reference = _reference(cells, against, plan.get("against"))
    values = {name: {cell.label: _values(cell, name) for cell in cells} for name in infos}
    found = {
        name: compare_with(values[name], reference, info.better) for name, info in infos.items()
    }
    summaries = tuple(
        _summary(
            cell,
            {name: _finding(values[name][cell.label], found[name][cell.label]) for name in infos},
        )
        for cell in cells
    )
    differing = tuple(differing_keys(records))
    return Comparison(
        name=str(plan.get("name") or _name(records)),
        metrics=infos,
        reference=reference,
        cells=summaries,
        pairs={name: tuple(all_pairs(values[name], info.better)) for name, info in infos.items()},
        problems=problems,
        notes=tuple(_notes(summaries, infos, usable, differing, reference)),
        budget=_budget(plan.get("budget"), summaries),
        differing=differing,
    )


def _values(cell: Cell, metric: str) -> dict[int, float]:
    return {
        run.seed: float(own.value)
        for run in cell.usable
        if (own := run.metrics.get(metric)) is not None and own.value is not None
    }


def _finding(values: dict[int, float], difference: Difference) -> Finding:
    mean, error = mean_and_error(values)
    return Finding(values=values, mean=mean, standard_error=error, difference=difference)


def _summary(cell: Cell, findings: dict[str, Finding]) -> CellSummary:
    costs = [run.cost for run in cell.usable if run.cost is not None]

    def of(name: str, reduce: Callable[[list[Any]], Any]) -> Any:
        numbers = [getattr(cost, name) for cost in costs if getattr(cost, name) is not None]
        return reduce(numbers) if numbers else None

    reduces: dict[str, Callable[[list[Any]], Any]] = {
        "trainable_parameters": max, "total_parameters": max, "peak_memory_bytes": max,
        "steps": fmean, "samples": fmean, "tokens": fmean, "train_seconds": fmean,
        "step_seconds": median,
    }  # fmt: skip
    taken = {name: of(name, reduce) for name, reduce in reduces.items()}
    return CellSummary(cell=cell, findings=findings, **taken)


def _ablation_of(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The file of the one ablation all runs are of; empty where there is none."""
    # FOLDER/cells/<label>/seed<k>
    homes = {record.path.resolve().parent.parent.parent for record in records}
    if len(homes) != 1 or not all(record.ablation for record in records):
        return {}
    path = homes.pop() / "ablation.yaml"
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no YAML ({str(error).splitlines()[0]})") from error
    return plan if isinstance(plan, dict) else {}


def _chosen(metrics: Sequence[str] | None, usable: Sequence[RunRecord]) -> list[str]:
    every = list(dict.fromkeys(name for run in usable for name in run.metrics))
    if not metrics:
        shared = [name for name in every if all(name in run.metrics for run in usable)]
        if not shared:
            raise UserError("the runs have no metric in common; name one that some have: --metric")
        # The score of captioning papers says most where there is one.
        return sorted(shared, key=lambda name: not name.endswith("/CIDEr-D"))
    for name in metrics:
        if name not in every:
            raise UserError(f"metric '{name}': no run has it; {nearest(name, every)}")
    return list(dict.fromkeys(metrics))


def _info(name: str, usable: Sequence[RunRecord]) -> MetricInfo:
    metric: Metric = next(run.metrics[name] for run in usable if name in run.metrics)
    return MetricInfo(
        name=name,
        unit=metric.unit,
        better=better_values(name),
        protocol=metric.protocol,
        chance=metric.chance,
    )


def _reference(cells: Sequence[Cell], against: str | None, coordinates: Any) -> str:
    labels = [cell.label for cell in cells]
    if against is not None:
        if against not in labels:
            raise UserError(f"cell '{against}': there is none; {nearest(against, labels)}")
        return against
    if isinstance(coordinates, dict) and coordinates:
        wanted = {str(axis): shown_value(value) for axis, value in coordinates.items()}
        for cell in cells:
            if wanted.items() <= cell.axes.items():
                return cell.label
    return labels[0]


def _name(records: Iterable[RunRecord]) -> str:
    return ", ".join(dict.fromkeys(record.name for record in records))


def _budget(plan: Any, cells: Sequence[CellSummary]) -> str | None:
    """What each cell was given: by the ablation's file, or what proved equal."""
    if isinstance(plan, dict):
        given = [(name, plan[name]) for name in MEASURES if plan.get(name) is not None]
        if given:
            name, amount = given[0]
            unit = {"flops": "FLOPs", "seconds": "seconds of computing"}.get(name, name)
            return f"{amount:,g} {unit}" if isinstance(amount, float) else f"{amount:,} {unit}"
    for name in ("steps", "samples", "tokens"):
        amounts = {getattr(cell, name) for cell in cells if cell.cell.usable}
        if len(amounts) == 1 and None not in amounts:
            return f"{amounts.pop():,.0f} {name}"
    return None


def _notes(
    cells: Sequence[CellSummary],
    infos: dict[str, MetricInfo],
    usable: Sequence[RunRecord],
    differing: Sequence[str],
    reference: str,
) -> Iterable[str]:
    for name in infos:
        lacking = [cell.label for cell in cells if not cell.findings[name].values]
        if reference in lacking:
            yield f"{name}: the reference {reference} has no value, so there are no verdicts"
        others = [label for label in lacking if label != reference]
        if others:
            yield f"{name}: no value for {', '.join(others)}"
    for section in dict.fromkeys(name.partition("/")[0] for name in infos):
        keys = [key for key in differing if key.startswith(f"evaluation.tasks.{section}.")]
        if keys:
            yield f"{section}: was not measured alike, {', '.join(keys)} differ; compare with care"
    if len({run.seed for run in usable}) == 1:
        yield "one seed: how much of a difference is chance cannot be said; run more seeds"
    if costless := sum(run.cost is None for run in usable):
        yield f"{costless} of {len(usable)} runs left no cost.json; what they took is not known"
