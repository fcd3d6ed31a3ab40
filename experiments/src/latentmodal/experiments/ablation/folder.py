"""The folder of an ablation: its file, its lock, and the runs of its cells."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentmodal.experiments.ablation.config import AblationConfig, read_ablation
from latentmodal.experiments.ablation.costs import CostFile
from latentmodal.experiments.ablation.expand import PlannedCell, changes, patches
from latentmodal.experiments.ablation.job import write_failure
from latentmodal.experiments.ablation.records import CELL_FILE, FAILED_FILE, shown_value
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.recipe import load_recipe, to_plain, to_yaml
from latentmodal.experiments.training.run_folder import RunFolder

FORMAT_VERSION = 1
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be done: a cell with a seed."""

    cell: PlannedCell
    seed: int
    ablation: str
    path: Path

    @property
    def done(self) -> bool:
        """Whether it was trained to its last step and evaluated."""
        return RunFolder(self.path).finished_file.is_file() and self.eval_file.is_file()

    @property
    def eval_file(self) -> Path:
        """What the run was found to be."""
        return self.path / "eval.json"

    @property
    def failure(self) -> str | None:
        """Why it failed, the last time it was tried; None where it did not."""
        path = self.path / FAILED_FILE
        if not path.is_file():
            return None
        return str(json.loads(path.read_text(encoding="utf-8")).get("reason", "no reason given"))

    def begin(self, max_steps: int) -> None:
        """Write what the worker reads."""
        self._write_cell()
        (self.path / FAILED_FILE).unlink(missing_ok=True)
        text = to_yaml(self.cell.recipe(self.seed, self.path, max_steps))
        write_text_atomically(RunFolder(self.path).recipe_file, text)

    def fail(self, reason: str) -> None:
        """Note why it failed, where its worker could not."""
        self._write_cell()
        write_failure(self.path, reason)

    def _write_cell(self) -> None:
        payload = {
            "format_version": FORMAT_VERSION,
            "ablation": self.ablation,
            "label": self.cell.label,
            "axes": self.cell.axes,
            "seed": self.seed,
        }
        write_text_atomically(self.path / CELL_FILE, json.dumps(payload, indent=2) + "\n")


@dataclass(frozen=True)
class AblationFolder:
    """Paths in the folder, and what is checked before one writes there."""

    path: Path

    @property
    def file(self) -> Path:
        """The ablation as it was last run."""
        return self.path / "ablation.yaml"

    @property
    def cells(self) -> Path:
        """Folder of the runs."""
        return self.path / "cells"

    @property
    def report(self) -> Path:
        """Folder of the comparison."""
        return self.path / "report"

    @property
    def board(self) -> Path:
        """What TensorBoard reads of the comparison."""
        return self.path / "tensorboard"

    @property
    def costs(self) -> CostFile:
        """What a step of each cell takes."""
        return CostFile(self.path / "costs.json")

    def jobs(self, config: AblationConfig, cells: Sequence[PlannedCell]) -> list[Job]:
        """Every run, seed by seed: an ablation that is stopped early has whole rounds of cells."""
        return [
            Job(
                cell=cell,
                seed=seed,
                ablation=config.name,
                path=self.cells / cell.folder_name / f"seed{seed}",
            )
            for seed in config.seeds
            for cell in cells
        ]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time; the system lets go of the lock of one that died.

        Raises:
            UserError: another process works here, or it is no folder that can be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); give another --folder"
            ) from error
        with file as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                owner = lock.read().strip()
                raise UserError(
                    f"{self.path}: process {owner or 'unknown'} works here; wait for it, or give "
                    "another --folder"
                ) from error
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {os.uname().nodename}")
            lock.flush()
            yield

    def check(self, config: AblationConfig) -> None:
        """Refuse another ablation in the same folder; cells and seeds may be added.

        Who works, what is measured of the runs and the cell compared against may change, too.

        Raises:
            UserError: anything else differs; says what.
        """
        if not self.file.is_file():
            return
        differences = _differences(read_ablation(str(self.file)), config)
        if differences:
            more = ", …" if len(differences) > _SHOWN else ""
            raise UserError(
                f"{self.path}: holds another ablation ({'; '.join(differences[:_SHOWN])}{more}); "
                "only cells and seeds may be added: give the same values or another --folder"
            )

    def check_runs(self, jobs: Sequence[Job], steps: Mapping[str, int]) -> None:
        """Refuse to go on where the recipe of a run that began would now be another one.

        Raises:
            UserError: the base recipe or the measured costs changed; says what.
        """
        for job in jobs:
            file = RunFolder(job.path).recipe_file
            if not file.is_file() or job.cell.label not in steps:
                continue
            new = to_plain(job.cell.recipe(job.seed, job.path, steps[job.cell.label]))
            found = [
                _shown_change(*change)
                for change in changes(to_plain(load_recipe(str(file))), new)
                if change[0] not in ("description", "run_dir")
            ]
            if found:
                raise UserError(
                    f"{job.path}: was run with another recipe ({'; '.join(found[:_SHOWN])}); "
                    "undo that change or give another --folder"
                )


def _differences(old: AblationConfig, new: AblationConfig) -> list[str]:
    """What of `old` is not in `new` as it was."""
    ours, theirs = old.plain(), new.plain()
    found = [
        _shown_change(*change)
        for key in ("base", "recipe", "budget")
        for change in changes(ours[key], theirs[key], key)
    ]
    cells = {label: patch for label, _, patch in patches(new)}
    for label, _, patch in patches(old):
        if label not in cells:
            found.append(f"cell {label} is gone")
        else:
            found += [_shown_change(*c) for c in changes(patch, cells[label], f"cell {label}")]
    return found + [f"seed {seed} is gone" for seed in old.seeds if seed not in new.seeds]


def _shown_change(key: str, old: Any, new: Any) -> str:
    return f"{key} was {shown_value(old)}, is {shown_value(new)}"
