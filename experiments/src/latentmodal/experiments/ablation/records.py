"""Trained runs as records, and records as the cells of a comparison."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.report import EvalReport, Metric
from latentmodal.experiments.training.cost import RunCost
from latentmodal.experiments.training.run_folder import RunFolder

CELL_FILE = "cell.json"
FAILED_FILE = "failed.json"
FORMAT_VERSION = 1

_FREE = frozenset(
    (
        *("seed", "run_dir", "description", "data.loader.prefetch", "evaluation.at_start"),
        *("evaluation.views", "trainer.log_every", "trainer.eval_every"),
        *("trainer.checkpoint_every", "trainer.keep_checkpoints"),
    )
)
"""Keys that change nothing of what a run finds, but for the seed."""
_MAX_LABEL_KEYS = 3
"""Runs that differ in more keys are called by their names."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder says of it.

    Attributes:
        path: the folder.
        name: of the recipe; of the folder where it holds none.
        seed: of the recipe, or of `cell.json`.
        keys: the resolved recipe, flat: "optim.lr" -> 0.001; lists are values.
        metrics: of `eval.json`, by "section/metric".
        cost: of `cost.json`; None where the run left none.
        finished: whether the last step was trained.
        failed: why the run failed, in one line; None where it did not.
        step: that of `eval.json`, else the last one trained; None where neither is known.
        label, axes, ablation: of `cell.json`; None and empty where there is none.
    """

    path: Path
    name: str
    seed: int
    keys: dict[str, Any]
    metrics: dict[str, Metric]
    cost: RunCost | None
    finished: bool
    failed: str | None
    step: int | None
    label: str | None
    axes: dict[str, str]
    ablation: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the run cannot be compared; None where it can."""
        if self.failed is not None:
            return f"failed: {self.failed}"
        if not self.finished:
            return "unfinished"
        return None if self.metrics else "not evaluated"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ in nothing but the seed, one per seed, by seed."""

    label: str
    axes: dict[str, str]
    runs: tuple[RunRecord, ...]

    @property
    def usable(self) -> tuple[RunRecord, ...]:
        """The runs that were finished and evaluated."""
        return tuple(run for run in self.runs if run.problem is None)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs at or below `paths`, each once, in natural order below each path.

    Raises:
        UserError: a path is no folder, or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "no such folder"
            raise UserError(f"{path}: {what}; give folders of runs, or folders above them")
        below = list(_runs_below(path))
        if not below:
            raise UserError(f"{path}: holds no run (no recipe.yaml here or below)")
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder, also that of a run that failed or is not finished.

    Raises:
        UserError: the folder is no run, or a file in it is broken.
    """
    run = RunFolder(folder)
    cell = _json(folder / CELL_FILE)
    if not run.recipe_file.is_file() and not cell:
        raise UserError(f"{folder}: no run here (recipe.yaml is missing)")
    keys = _recipe_keys(run.recipe_file)
    failed, finished = _json(folder / FAILED_FILE), _json(run.finished_file)
    report = read_report(folder / "eval.json")
    step = report.context.get("step") if report else finished.get("step")
    try:
        seed = int(cell.get("seed", keys.get("seed", 0)))
        cost = RunCost.read(run.cost_file) if run.cost_file.is_file() else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: cell.json or cost.json is broken ({error})") from error
    return RunRecord(
        path=folder,
        name=str(keys.get("name", folder.name)),
        seed=seed,
        keys=keys,
        metrics={
            f"{section}/{name}": metric
            for section, metrics in (report.sections if report else {}).items()
            for name, metric in metrics.items()
        },
        cost=cost,
        finished=bool(finished),
        failed=str(failed.get("reason", "no reason given")) if failed else None,
        step=int(step) if isinstance(step, int | float) else None,
        label=cell.get("label"),
        axes={str(key): str(value) for key, value in cell.get("axes", {}).items()},
        ablation=cell.get("ablation"),
    )


def cells_of(records: Sequence[RunRecord]) -> list[Cell]:
    """Records grouped into cells, in the order of their first runs.

    Runs with a `cell.json` belong together by its label; others where their recipes are equal but
    for seed and run_dir, and such a cell is labelled by the keys in which the cells differ.

    Raises:
        UserError: two runs of a cell have the same seed.
    """
    groups: list[list[RunRecord]] = []
    for record in records:
        home = next((runs for runs in groups if _belong_together(runs[0], record)), None)
        groups.append([record]) if home is None else home.append(record)
    named = iter(_with_labels([runs[0] for runs in groups if runs[0].label is None]))
    ablations = {record.ablation for record in records if record.label is not None}
    cells = []
    for runs in groups:
        first = runs[0] if runs[0].label is not None else next(named)
        label = str(first.label)
        if first.ablation is not None and len(ablations) > 1:
            label = f"{first.ablation}: {label}"
        ordered = tuple(sorted(runs, key=lambda run: run.seed))
        for one, other in pairwise(ordered):
            if one.seed == other.seed:
                raise UserError(
                    f"{one.path} and {other.path}: both are seed {one.seed} of the cell "
                    f"'{label}'; leave one of them out"
                )
        cells.append(Cell(label=label, axes=first.axes, runs=ordered))
    return _unique(cells)


def differing_keys(records: Sequence[RunRecord]) -> list[str]:
    """Keys of the recipes that are not equal in all records, those free to differ left out.

    An absent key is as good as null: recipes of older versions lack keys that were off. A value
    that differs only as the runs' seeds do, such as the folder of an earlier stage, is equal.
    """
    every = dict.fromkeys(key for record in records for key in record.keys)
    first = records[0] if records else None
    return [
        key
        for key in every
        if first is not None
        and key not in _FREE
        and not all(_equal(key, first, record) for record in records)
    ]


def shown_value(value: Any) -> str:
    """A recipe's value on one line; None is `null`."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _equal(key: str, one: RunRecord, other: RunRecord) -> bool:
    mine, theirs = one.keys.get(key), other.keys.get(key)
    if isinstance(mine, str) and isinstance(theirs, str) and mine != theirs:
        return _seedless(mine, one.seed) == _seedless(theirs, other.seed)
    return bool(mine == theirs)


def _seedless(value: str, seed: int) -> str:
    return re.sub(rf"seed{seed}(?!\d)", "seed{seed}", value)


def _belong_together(one: RunRecord, other: RunRecord) -> bool:
    if one.label is not None or other.label is not None:
        return (one.ablation, one.label) == (other.ablation, other.label)
    return not differing_keys([one, other])


def _with_labels(records: list[RunRecord]) -> list[RunRecord]:
    """Labels by the keys that differ; by name, or by folder, where these are too many."""
    keys = [key for key in differing_keys(records) if key != "name"]
    names = [record.name for record in records]
    if 0 < len(keys) <= _MAX_LABEL_KEYS:
        axes = [{key: shown_value(record.keys.get(key)) for key in keys} for record in records]
        labels = [",".join(f"{key.split('.')[-1]}={own[key]}" for key in keys) for own in axes]
    else:
        axes = [{"name": name} for name in names]
        unique = len(set(names)) == len(names)
        labels = names if unique else [_folder_label(record) for record in records]
    return [
        replace(record, label=label, axes=own)
        for record, label, own in zip(records, labels, axes, strict=True)
    ]


def _folder_label(record: RunRecord) -> str:
    path = record.path.resolve()
    return path.parent.name if path.name == f"seed{record.seed}" else path.name


def _unique(cells: list[Cell]) -> list[Cell]:
    """Cells that would be called alike are told apart by their folders."""
    labels = [cell.label for cell in cells]
    return [
        replace(cell, label=f"{cell.label} ({cell.runs[0].path})")
        if labels.count(cell.label) > 1
        else cell
        for cell in cells
    ]


def _runs_below(path: Path) -> Iterable[Path]:
    for folder, folders, files in os.walk(path):
        folders.sort(key=_natural)
        if "recipe.yaml" in files or CELL_FILE in files:
            folders.clear()  # what lies inside a run is the run's
            yield Path(folder)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _recipe_keys(path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = node

    if path.is_file():
        try:
            walk(yaml.safe_load(path.read_text(encoding="utf-8")), "")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: is no YAML ({str(error).splitlines()[0]})") from error
    return flat


def read_report(path: Path) -> EvalReport | None:
    """An evaluation; None where there is no such file.

    Raises:
        UserError: it is broken.
    """
    if not path.is_file():
        return None
    return EvalReport.read_json(path)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error
    if not isinstance(payload, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(payload).__name__}")
    return payload
