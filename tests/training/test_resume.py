"""A resumed run is the uninterrupted one, bit for bit, however it was interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finished_runs import final_state
from latentmodal.experiments.training.checkpoints import latest_checkpoint, step_of

STEPS = 60


def curve(run: Path) -> dict[int, float]:
    """Loss by step; a step logged twice (before the kill and after) must agree with itself."""
    losses: dict[int, float] = {}
    for folder in sorted((run / "tensorboard").glob("events*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        if "train/loss" not in events.Tags()["scalars"]:
            continue
        for event in events.Scalars("train/loss"):
            assert losses.setdefault(event.step, event.value) == event.value, f"step {event.step}"
    return losses


def command(recipe: Path, run: Path, workers: int) -> list[str]:
    keys = (f"run_dir={run}", f"trainer.max_steps={STEPS}", f"data.loader.workers={workers}")
    return [sys.executable, "-m", "latentmodal.experiments.cli", "fit", str(recipe), *keys]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def fit(recipe: Path, run: Path, workers: int, *more: str) -> None:
    done = subprocess.run(
        [*command(recipe, run, workers), *more],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interrupt(recipe: Path, run: Path, workers: int, how: signal.Signals) -> int:
    """Start a run, wait for its second checkpoint, send the signal; the exit code."""
    process = subprocess.Popen(
        command(recipe, run, workers),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while step_of(latest_checkpoint(run / "checkpoints") or Path()) < 4:
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    return process.wait(timeout=60)


@pytest.mark.parametrize(
    ("workers", "how"), [(0, signal.SIGKILL), (2, signal.SIGKILL), (0, signal.SIGTERM)]
)
def test_interrupted_run_equals_uninterrupted_one(
    tiny_recipe: Path, tmp_path: Path, workers: int, how: signal.Signals
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(tiny_recipe, whole, workers)
    exit_code = interrupt(tiny_recipe, broken, workers, how)
    assert exit_code == (-signal.SIGKILL if how == signal.SIGKILL else 143)
    assert step_of(latest_checkpoint(broken / "checkpoints") or Path()) < STEPS
    fit(tiny_recipe, broken, workers, "resume=true")

    assert curve(broken) == curve(whole)
    assert len(curve(whole)) == STEPS
    ours, theirs = final_state(broken, STEPS), final_state(whole, STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
