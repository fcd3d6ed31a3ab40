"""Runs in processes of their own: killed and gone on with, submitted, sent to Ray."""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from finished_runs import checkpoint, sections
from latentmodal.experiments.ablation import run, workers
from latentmodal.experiments.ablation.config import WorkersConfig, read_ablation
from latentmodal.experiments.ablation.costs import CellCost
from latentmodal.experiments.ablation.expand import expand
from latentmodal.experiments.ablation.folder import AblationFolder
from latentmodal.experiments.ablation.workers import Task, build_engine, run_process, run_tasks
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe, to_yaml

COST = CellCost(
    trainable_parameters=1,
    total_parameters=1,
    samples_per_step=8,
    tokens_per_step=None,
    step_seconds=0.1,
    flops_per_step=1,
)
RUN = "cells/optim.lr=0.001/seed0"


@pytest.fixture
def one_cell(ablation_file: Path) -> Path:
    """An ablation of one cell that trains for some seconds, and needs no measuring."""
    raw = yaml.safe_load(ablation_file.read_text())
    raw |= {"axes": {"optim.lr": [0.001]}, "budget": {"steps": 80}}
    ablation_file.write_text(yaml.safe_dump(raw))
    config = read_ablation(str(ablation_file))
    (cell,) = expand(config).cells
    AblationFolder(config.path).costs.put(cell.label, cell.digest, COST)
    return ablation_file


def heed_ctrl_c() -> None:
    """A shell has what it starts in the background ignore it, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "latentmodal.experiments.cli", "ablate", str(file)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def is_free(folder: Path) -> bool:
    """Whether no process trains in a run's folder."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_undisturbed(one_cell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / RUN
    process = begin(one_cell)
    wait_for(lambda: list(folder.glob("checkpoints/*.ckpt.sha256")))
    process.kill()  # SIGKILL: nothing can be tidied up
    process.wait()
    wait_for(lambda: is_free(folder), seconds=5)  # its worker died with it
    assert not (folder / "finished.json").exists()
    again = begin(one_cell)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "going on from" in (folder / "log.txt").read_text()
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    # The same run, left alone; in a process as well, for sums depend on how it has its threads.
    whole = tmp_path / "whole"
    whole.mkdir()
    recipe = load_recipe(str(folder / "recipe.yaml"), [f"run_dir={whole}"])
    (whole / "recipe.yaml").write_text(to_yaml(recipe))
    assert run_process(Task(kind="fit", folder=whole), threads=1) == 0
    assert sections(folder / "eval.json") == sections(whole / "eval.json")
    ours, theirs = checkpoint(folder)["state_dict"], checkpoint(whole)["state_dict"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(one_cell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / RUN
    process = begin(one_cell)
    wait_for(lambda: list(folder.glob("checkpoints/*.ckpt.sha256")))
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.splitlines()[-1].startswith("stopped; the same command goes on in ")
    assert is_free(folder)
    assert not (folder / "failed.json").exists()


class FakeEngine:
    """Tasks that end when they are told to."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.codes, self.running, self.most, self.stopped = codes, 0, 0, list[str]()

    def start(self, task: Task) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        return task.folder.name

    def exit_code(self, handle: str) -> int | None:
        self.running -= 1
        return self.codes[handle]

    def stop(self, handles: Any) -> None:
        self.stopped += handles


def test_so_many_at_a_time_and_each_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.0)
    engine = FakeEngine({"a": 0, "b": 1, "c": -9})
    told: list[tuple[str, int]] = []
    tasks = [Task(kind="fit", folder=Path(name)) for name in "abc"]
    run_tasks(engine, tasks, 2, lambda task, code: told.append((task.folder.name, code)))
    assert told == [("a", 0), ("b", 1), ("c", -9)]
    assert engine.most == 2
    assert engine.stopped == []


def test_an_interruption_stops_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine({"a": 0, "b": 0})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    tasks = [Task(kind="fit", folder=Path(name)) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        run_tasks(engine, tasks, 2, interrupt)
    assert engine.stopped == ["b"]


def test_a_worker_that_is_killed_has_failed(tmp_path: Path) -> None:
    assert run._reason(tmp_path, -9) == "its process was ended by signal 9 (out of memory?)"
    assert "exit code 3; see log.txt" in run._reason(tmp_path, 3)


@pytest.mark.parametrize("engine", ["submitit", "ray"])
def test_an_engine_that_is_missing_is_one_line(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=f"{engine} is not installed; pip install {engine}, or"):
        build_engine(WorkersConfig(engine=engine), tmp_path)


def trains(file: Path, engine: str, options: str) -> str:
    """Run the ablation through an engine; returns the log of its one run."""
    config = read_ablation(
        str(file), ["budget.steps=2", f"workers={{engine: {engine}, options: {options}}}"]
    )
    failed = run.ablate(config, console=Console(file=io.StringIO()))
    assert [job.failure for job in failed] == []
    return (config.path / RUN / "log.txt").read_text()


@pytest.mark.slow
def test_submitit_runs_the_cells(one_cell: Path, comparisons: list[Any]) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    assert "step 2" in trains(one_cell, "submitit", "{cluster: local, timeout_min: 5}")
    with pytest.raises(UserError, match=r"workers.options: submitit refuses them"):
        trains(one_cell, "submitit", "{cluster: nowhere}")


@pytest.mark.slow
def test_ray_runs_the_cells(one_cell: Path, comparisons: list[Any]) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    try:
        assert "step 2" in trains(one_cell, "ray", "{}")
    finally:
        ray.shutdown()


def test_a_job_without_its_parent_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "latentmodal.experiments.ablation.job", "fit", str(tmp_path)]
    environment = {**os.environ, workers.PARENT: "1"}
    done = subprocess.run([*command, "1"], env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "failed.json").exists()
