"""Finished runs: chains of trainings that build on each other, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from latentmodal.experiments.evaluation.run import load_system
from latentmodal.experiments.training.checkpoints import (
    latest_checkpoint,
    read_checkpoint,
    step_of,
)
from latentmodal.experiments.training.run_folder import RunFolder


@dataclass(frozen=True)
class Chain:
    """Recipes and runs of several trainings, each made once."""

    recipes: Path
    runs: Path

    def recipe(self, name: str) -> Path:
        return self.recipes / f"{name}.yaml"

    def run(self, name: str) -> Path:
        return self.runs / name

    def write(self, texts: Mapping[str, str]) -> None:
        """Write recipes by name; RUNS in a text stands for the folder of the runs."""
        for name, text in texts.items():
            self.recipe(name).write_text(text.replace("RUNS", str(self.runs)))


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()


def scalars(run: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(run).Scalars(tag)}


def checkpoint(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return {**read_checkpoint(path), "path": path}


def sections(file: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads(file.read_text())["sections"]
    return content


def assert_finite(found: dict[str, dict[str, Any]]) -> None:
    for name, metrics in found.items():
        assert metrics, name
        for metric, entry in metrics.items():
            assert math.isfinite(entry["value"]), f"{name}/{metric}"


def final_state(run: Path, steps: int) -> dict[str, Tensor]:
    """Weights and the optimizer's moments after the last of `steps`, by name."""
    saved = checkpoint(run)
    assert step_of(saved["path"]) == steps
    moments = saved["optimizer_states"][0]["state"]
    flat = {f"{n}.{k}": v for n, state in moments.items() for k, v in state.items()}
    return {**saved["state_dict"], **flat}


def system_of(run: Path) -> Any:
    """The system as evaluation has it."""
    system, _ = load_system(RunFolder(run), RunFolder(run).checkpoint())
    return system


def model_of(run: Path) -> Any:
    return system_of(run).model
