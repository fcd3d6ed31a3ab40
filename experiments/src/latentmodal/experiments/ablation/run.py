"""Running an ablation: what is not done yet, cell by cell, to the comparison at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from latentmodal.experiments.ablation.budget import steps_for
from latentmodal.experiments.ablation.config import AblationConfig
from latentmodal.experiments.ablation.costs import CellCost
from latentmodal.experiments.ablation.expand import Plan, expand
from latentmodal.experiments.ablation.folder import AblationFolder, Job
from latentmodal.experiments.ablation.job import PREPARE_FILE
from latentmodal.experiments.ablation.records import FAILED_FILE
from latentmodal.experiments.ablation.workers import (
    LOG_FILE,
    Engine,
    Task,
    build_engine,
    run_tasks,
)
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.report import EvalReport
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.recipe import to_plain

log = logging.getLogger(__name__)


def ablate(config: AblationConfig, *, console: Console) -> list[Job]:
    """Run what is not done of an ablation, compare its cells, and say where to look.

    Returns:
        The runs that failed; they are tried again the next time.

    Raises:
        UserError: the file or a recipe is wrong, the folder is another ablation's or in use, …
    """
    plan = expand(config)
    folder = AblationFolder(config.path)
    with folder.lock():
        folder.check(config)
        engine = build_engine(config.workers, folder.path)
        jobs = folder.jobs(config, plan.cells)
        # Before anything runs: from here on the folder is this ablation's.
        # The reference by name, also where it is the first cell: compare sorts cells anew.
        kept = dataclasses.replace(config, against=dict(plan.reference.axes))
        write_text_atomically(folder.file, kept.to_yaml())
        steps = _steps(plan, config, folder, engine, console)
        folder.check_runs(jobs, steps)
        pending = _pending(jobs, steps, folder)
        if pending:
            console.print(f"{len(pending)} of {len(jobs)} runs to do, logs in {folder.cells}")
            _fill_caches(pending, folder, engine)
            _run(pending, steps, config, engine, console)
        _compare(config, plan, jobs, folder, console)
    return [job for job in jobs if not job.done]


def _steps(
    plan: Plan, config: AblationConfig, folder: AblationFolder, engine: Engine, console: Console
) -> dict[str, int]:
    """How many steps its budget buys each cell, by label; those that cannot be built are left out.

    A budget of steps asks for no measurement: what cannot be built fails by itself.
    """
    if config.budget.steps is not None:
        return {cell.label: config.budget.steps for cell in plan.cells}
    costs = measured_costs(plan, config, folder, engine, console)
    return {label: steps_for(config.budget, cost, label) for label, cost in costs.items()}


def measured_costs(
    plan: Plan, config: AblationConfig, folder: AblationFolder, engine: Engine, console: Console
) -> dict[str, CellCost]:
    """Costs by label of the cells that can be measured; those in the folder are not again."""
    digests = {cell.label: cell.digest for cell in plan.cells}
    known = folder.costs.costs(digests)
    missing = [cell for cell in plan.cells if cell.label not in known]
    if not missing:
        return known
    console.print(f"measuring a few steps of {len(missing)} cells")
    recipes = {cell.label: cell.recipe(config.seeds[0], folder.path) for cell in missing}
    measure = {
        cell.label: {"digest": cell.digest, "recipe": to_plain(recipes[cell.label])}
        for cell in missing
    }
    _prepare(folder, engine, {"measure": measure, "cache": []})
    return folder.costs.costs(digests)


def _fill_caches(pending: Sequence[Job], folder: AblationFolder, engine: Engine) -> None:
    """Encode the pictures once for all cells that train from features where they are looked for."""
    recipes: dict[str, Any] = {}
    for job in pending:
        recipe = to_plain(job.cell.recipe(job.seed, folder.path))
        if recipe["data"]["features"] == "auto":
            # Equal in these, equal up to the bridge; a tower without weights is drawn by the seed.
            system = {k: v for k, v in recipe["system"].items() if k not in ("bridge", "llm")}
            parts = (system, recipe["data"], recipe["freeze"], recipe["seed"])
            recipes.setdefault(json.dumps([*parts, recipe["trainer"]["precision"]]), recipe)
    if recipes:
        _prepare(folder, engine, {"measure": {}, "cache": list(recipes.values())})


def _prepare(folder: AblationFolder, engine: Engine, todo: dict[str, Any]) -> None:
    """Have a worker do it: it may have the accelerator, and its memory goes with it."""
    write_text_atomically(folder.path / PREPARE_FILE, json.dumps(todo) + "\n")
    failed = folder.path / FAILED_FILE
    failed.unlink(missing_ok=True)
    codes: list[int] = []
    run_tasks(engine, [Task(kind="prepare", folder=folder.path)], 1, lambda _, c: codes.append(c))
    if codes != [0]:
        reason = _reason(folder.path, codes[0])
        failed.unlink(missing_ok=True)
        raise UserError(f"{reason} (see {folder.path / LOG_FILE})")
    (folder.path / PREPARE_FILE).unlink(missing_ok=True)


def _pending(jobs: Sequence[Job], steps: dict[str, int], folder: AblationFolder) -> list[Job]:
    """Runs to do; those of a cell that cannot be built have failed already."""
    reasons = folder.costs.reasons()
    pending = []
    for job in jobs:
        if job.done:
            continue
        if job.cell.label in steps:
            pending.append(job)
        else:
            job.fail(reasons.get(job.cell.label, "could not be measured"))
    return pending


def _run(
    pending: Sequence[Job],
    steps: dict[str, int],
    config: AblationConfig,
    engine: Engine,
    console: Console,
) -> None:
    by_path = {job.path: job for job in pending}
    for job in pending:
        job.begin(steps[job.cell.label])
    began = time.monotonic()
    ended = 0

    def report(task: Task, code: int) -> None:
        nonlocal ended
        ended += 1
        job = by_path[task.folder]
        if code or not job.done:
            job.fail(_reason(job.path, code))
        else:
            (job.path / FAILED_FILE).unlink(missing_ok=True)
        left = (time.monotonic() - began) / ended * (len(pending) - ended)
        console.print(
            f"\\[{ended}/{len(pending)}] {escape(_outcome(job, config.metrics[0]))}, "
            f"{left / 60:.0f} min left",
            highlight=False,
            soft_wrap=True,
        )

    tasks = [Task(kind="fit", folder=job.path) for job in pending]
    run_tasks(engine, tasks, config.workers.count, report)


def _outcome(job: Job, metric: str) -> str:
    name = f"{job.cell.label} seed {job.seed}"
    if not job.done:
        return f"{name}: failed: {job.failure}"
    section, _, key = metric.partition("/")
    found = EvalReport.read_json(job.eval_file).sections.get(section, {}).get(key)
    value = "-" if found is None or found.value is None else f"{found.value:.4g}"
    cost = json.loads((job.path / "cost.json").read_text(encoding="utf-8"))
    return f"{name}: {metric} {value}, {cost['train_seconds']:.1f} s of training"


def _reason(folder: Path, code: int) -> str:
    """What a worker left, or how it ended."""
    path = folder / FAILED_FILE
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
    if code < 0:
        return f"its process was ended by signal {-code} (out of memory?)"
    return f"its process ended with exit code {code}; see {LOG_FILE}"


def _compare(
    config: AblationConfig,
    plan: Plan,
    jobs: Sequence[Job],
    folder: AblationFolder,
    console: Console,
) -> None:
    from latentmodal.experiments.ablation.summary import compare_runs
    from latentmodal.experiments.ablation.tables import terminal
    from latentmodal.experiments.ablation.wording import headline

    if not any(job.done for job in jobs):
        raise UserError(f"{folder.path}: every run failed; the first: {jobs[0].failure}")
    comparison = compare_runs(
        [job.path for job in jobs],
        metrics=config.metrics,
        against=plan.reference.label,
        out=folder.report,
        board=folder.board,
    )
    console.print(headline(comparison), markup=False, highlight=False)
    console.print(terminal(comparison, console.width))
    console.print(f"report      {folder.report / 'report.html'}", soft_wrap=True)
    console.print(f"TensorBoard tensorboard --logdir {folder.board}", soft_wrap=True)
