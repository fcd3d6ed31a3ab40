"""From axes to cells: every combination as a recipe of its own, checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmodal.experiments.ablation.config import AblationConfig
from latentmodal.experiments.ablation.records import shown_value
from latentmodal.experiments.choose import nearest
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import Layer, load_recipe, merge, to_plain
from latentmodal.experiments.schema import Recipe

Change = tuple[str, Any, Any]
"""(dotted key, the base's value, the cell's); a replaced component is one change."""

_VARIABLE = re.compile(r"\$\{([^${}]*)\}")
_ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """One combination of the axes.

    Attributes:
        label: "bridge=linear,tokens=9".
        axes: axis -> label of its value.
        base: the recipe it is laid over.
        patch: what it changes there, variables filled in.
        digest: of its resolved recipe; seed, folder and length aside.
        changes: what differs from the base alone.
    """

    label: str
    axes: dict[str, str]
    base: str
    patch: dict[str, Any]
    digest: str
    changes: tuple[Change, ...]

    @property
    def folder_name(self) -> str:
        """The label, with what a file system may not like replaced."""
        return folder_name(self.label)

    def recipe(self, seed: int, folder: Path, max_steps: int | None = None) -> Recipe:
        """The recipe of one run; without `max_steps` as long as the base's."""
        patch: dict[str, Any] = {"seed": seed, "run_dir": str(folder)}
        if max_steps is not None:
            patch["trainer"] = {"max_steps": max_steps}
        layers: list[Layer] = [(f"cell {self.label}", self.patch), ("the ablation", patch)]
        return load_recipe(self.base, patches=layers)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of an ablation and what they have in common.

    Attributes:
        cells: in the order of the axes.
        reference: the cell the others are compared with.
        common: changes from the base that every cell has.
    """

    cells: tuple[PlannedCell, ...]
    reference: PlannedCell
    common: tuple[Change, ...]


@dataclass(frozen=True)
class _Point:
    """One value of an axis: its label, what it patches, and what its variable stands for."""

    label: str
    patch: Mapping[str, Any]
    value: Any


def expand(config: AblationConfig) -> Plan:
    """Every combination of the axes that is not left out, each resolved and checked.

    Raises:
        UserError: a cell's recipe is refused, two cells are the same, an unknown variable or
            coordinate, …
    """
    plain = to_plain(load_recipe(config.base))
    cells = []
    tasks: dict[str, None] = {}
    for label, coordinates, patch in patches(config):
        where = f"ablation {config.name}, cell {label}"
        try:
            recipe = load_recipe(config.base, patches=[(where, patch)])
        except UserError as error:
            message = str(error)
            raise UserError(message if where in message else f"{where}: {message}") from error
        resolved = to_plain(recipe)
        tasks |= dict.fromkeys(recipe.evaluation.tasks)
        cells.append(
            PlannedCell(
                label=label,
                axes=coordinates,
                base=config.base,
                patch=patch,
                digest=_digest(resolved),
                changes=tuple(changes(plain, resolved)),
            )
        )
    _check_different(cells)
    _check_metrics(config.metrics, list(tasks))
    shared = tuple(
        change for change in cells[0].changes if all(change in cell.changes for cell in cells)
    )
    return Plan(cells=tuple(cells), reference=_reference(config, cells), common=shared)


def patches(config: AblationConfig) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """Label, coordinates and patch of every cell, variables filled in; no recipe is read.

    Raises:
        UserError: an axis that is none, an unknown variable or coordinate, nothing left to run.
    """
    axes = {name: _points(name, values) for name, values in config.axes.items()}
    for number, entry in enumerate(config.leave_out):
        _check_coordinates(entry, axes, f"leave_out[{number}]")
    _check_coordinates(config.against, axes, "against")
    found = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        coordinates = {name: point.label for name, point in chosen.items()}
        if any(_matches(coordinates, entry) for entry in config.leave_out):
            continue
        values = {name: point.value for name, point in chosen.items()}
        raw: Mapping[str, Any] = config.recipe
        for point in combination:
            raw = merge(raw, point.patch)
        patch = _filled(raw, values)
        label = ",".join(f"{name}={value}" for name, value in coordinates.items())
        found.append((label, coordinates, patch))
    if not found:
        raise UserError("leave_out: leaves no cell to run; take an entry out")
    return found


def changes(old: Any, new: Any, key: str = "") -> Iterable[Change]:
    """Where two resolved recipes differ; a component of another name is one change."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("name") == new.get("name") or not key:
            for name in dict.fromkeys([*old, *new]):
                inner = f"{key}.{name}" if key else name
                yield from changes(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
            return
        old = old.get("name", old)
    if old != new:
        yield key, old, new


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.,=+-]", "_", label)


def _points(axis: str, values: Any) -> list[_Point]:
    if not values or not isinstance(values, Mapping | list):
        raise UserError(f"axes.{axis}: expected label: patch, or a list of values; got {values!r}")
    if isinstance(values, Mapping):
        for label, patch in values.items():
            if not isinstance(patch, Mapping | None):
                raise UserError(
                    f"axes.{axis}.{label}: expected a patch of the recipe, got {patch!r}; "
                    "a list of values needs no labels"
                )
        return [_Point(str(label), patch or {}, str(label)) for label, patch in values.items()]
    points = []
    for value in values:
        nested: Any = value
        for part in reversed(axis.split(".")):
            nested = {part: nested}
        points.append(_Point(shown_value(value), nested if "." in axis else {}, value))
    labels = [point.label for point in points]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"axes.{axis}: {repeated[0]} stands there twice; name each value once")
    return points


def _filled(node: Any, values: Mapping[str, Any]) -> Any:
    """`node` with each `${axis}` replaced; one that is all of a text keeps its type."""
    if isinstance(node, Mapping):
        return {name: _filled(value, values) for name, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, values) for value in node]
    if not isinstance(node, str):
        return node
    for name in _VARIABLE.findall(node):
        if name not in values:
            raise UserError(f"'{node}': no axis is called {name}; {nearest(name, list(values))}")
    whole = _VARIABLE.fullmatch(node)
    return (
        values[whole.group(1)]
        if whole
        else _VARIABLE.sub(lambda found: shown_value(values[found.group(1)]), node)
    )


def _check_coordinates(
    entry: Mapping[str, Any], axes: Mapping[str, Sequence[_Point]], where: str
) -> None:
    for name, value in entry.items():
        if name not in axes:
            raise UserError(f"{where}: no axis is called {name}; {nearest(name, list(axes))}")
        labels = [point.label for point in axes[name]]
        if shown_value(value) not in labels:
            raise UserError(
                f"{where}: axis {name} has no {shown_value(value)}; choose from {', '.join(labels)}"
            )


def _matches(coordinates: Mapping[str, str], entry: Mapping[str, Any]) -> bool:
    return all(coordinates[name] == shown_value(value) for name, value in entry.items())


def _reference(config: AblationConfig, cells: Sequence[PlannedCell]) -> PlannedCell:
    found = [cell for cell in cells if _matches(cell.axes, config.against)]
    if not found:
        raise UserError("against: this cell is left out; choose one that runs")
    if config.against and len(found) > 1:
        missing = [name for name in config.axes if name not in config.against]
        raise UserError(
            f"against: fits {len(found)} cells; give a value of {', '.join(missing)}, too"
        )
    return found[0]


def _check_metrics(metrics: Sequence[str], tasks: Sequence[str]) -> None:
    """No cell would ever have a metric of a task that none evaluates."""
    for metric in metrics:
        task = metric.partition("/")[0]
        if task not in tasks:
            raise UserError(
                f"metrics: '{metric}': no cell has a task {task} among evaluation.tasks; "
                + (nearest(task, list(tasks)) if tasks else "add one")
            )


def _check_different(cells: Sequence[PlannedCell]) -> None:
    for one, other in itertools.combinations(cells, 2):
        if one.digest == other.digest:
            raise UserError(
                f"cells {one.label} and {other.label} are the same recipe: an axis of values is a "
                "dotted key of the recipe, or a variable that a patch uses as ${name}"
            )
        if one.folder_name == other.folder_name:
            raise UserError(
                f"cells {one.label} and {other.label} would share the folder {one.folder_name}; "
                "use other labels"
            )


def _digest(resolved: Mapping[str, Any]) -> str:
    free = ("seed", "run_dir", "description")
    kept = {key: value for key, value in resolved.items() if key not in free}
    kept["trainer"] = {k: v for k, v in kept["trainer"].items() if k != "max_steps"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
