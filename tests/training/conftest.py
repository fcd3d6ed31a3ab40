"""Finished runs of the tiny recipe, trained in this process."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.fit import fit as run_fit

Fit = Callable[..., str]


@pytest.fixture
def fit(tiny_recipe: Path) -> Fit:
    """`(*overrides, resume=False)` -> what a fit of the tiny recipe prints."""

    def call(*overrides: str, resume: bool = False) -> str:
        console = Console(file=io.StringIO(), width=200)
        run_fit(load_recipe(str(tiny_recipe), overrides), resume=resume, console=console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    return call


@pytest.fixture(scope="session")
def trained_once() -> list[Path]:
    """The run that `finished_run` copies, once there is one."""
    return []


@pytest.fixture
def finished_run(
    fit: Fit, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, trained_once: list[Path]
) -> Path:
    """A copy of a finished run of six steps, checkpoints at 4 and 6, where `fit` looks for it."""
    if not trained_once:
        folder = tmp_path_factory.mktemp("trained") / "run"
        fit(f"run_dir={folder}")
        trained_once.append(folder)
    return shutil.copytree(trained_once[0], tmp_path / "run")
