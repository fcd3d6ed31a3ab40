"""A tiny ablation whose cells are trained in seconds, and an engine without processes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from latentmodal.experiments.ablation import job, run, summary
from latentmodal.experiments.ablation.config import read_ablation
from latentmodal.experiments.ablation.workers import Task

ABLATION = """
name: tiny
base: tiny.yaml
axes:
  optim.lr: [1e-3, 3e-3]
seeds: [0]
budget: {steps: 3}
metrics: [unseen_pairs/image_to_text_R@1]
"""


@pytest.fixture
def ablation_file(tmp_path: Path, tiny_clip: str, emoji_cache: Path) -> Path:
    """An ablation of two cells over a base beside it; it is kept under `tmp_path`."""
    base = yaml.safe_load(tiny_clip)
    tasks = base["evaluation"]["tasks"]
    base["evaluation"]["tasks"] = {name: None for name in tasks if name != "unseen_pairs"} | {
        "unseen_pairs": tasks["unseen_pairs"]
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "ablation.yaml"
    path.write_text(f"{ABLATION}folder: {tmp_path}/out\n")
    return path


class HereEngine:
    """Runs a task in this process when it is started; notes which."""

    def __init__(self) -> None:
        self.started: list[Task] = []

    def start(self, task: Task) -> int:
        self.started.append(task)
        try:
            job.fit(task.folder) if task.kind == "fit" else job.prepare(task.folder)
        except Exception as error:
            job.write_failure(task.folder, job.one_line(error))
            return 1
        return 0

    def exit_code(self, handle: int) -> int:
        return handle

    def stop(self, handles: Sequence[int]) -> None:
        pass

    def trained(self) -> list[str]:
        """Cell and seed of each run that was started."""
        fits = [task.folder for task in self.started if task.kind == "fit"]
        return [f"{folder.parent.name}/{folder.name}" for folder in fits]


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Path], dict[str, Any]]]:
    """What the end of an ablation asks to be compared; no report is written."""
    asked: list[tuple[list[Path], dict[str, Any]]] = []
    real = summary.compare_runs

    def compare_runs(folders: Sequence[Path], **options: Any) -> Any:
        asked.append((list(folders), options))
        return real(folders, metrics=options["metrics"], against=options["against"])

    monkeypatch.setattr(summary, "compare_runs", compare_runs)
    return asked


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, comparisons: list[Any]) -> HereEngine:
    """Every ablation of this test runs in this process."""
    here = HereEngine()
    monkeypatch.setattr(run, "build_engine", lambda *_: here)
    return here


@pytest.fixture
def ablate(engine: HereEngine) -> Callable[..., tuple[list[Any], str]]:
    """`(file, *overrides)` -> runs that failed, and what was printed."""

    def call(file: Path, *overrides: str) -> tuple[list[Any], str]:
        console = Console(file=io.StringIO(), width=200)
        failed = run.ablate(read_ablation(str(file), overrides), console=console)
        assert isinstance(console.file, io.StringIO)
        return failed, console.file.getvalue()

    return call
