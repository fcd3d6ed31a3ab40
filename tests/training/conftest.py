"""Finished runs of tiny recipes, trained in this process."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from blip2_recipes import ALIGNMENT, GENERATION, LANGUAGE_MODEL, NO_TASKS
from command_line import main
from finished_runs import Chain
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


@pytest.fixture(scope="session")
def blip2_chain(
    tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path, tiny_clip: str
) -> Chain:
    """The recipes and runs `clip`, `stage1`, `lm` and `stage2`."""
    made = Chain(tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("runs"))
    texts = {
        "clip": f"{tiny_clip}run_dir: RUNS/clip\n",
        "stage1": ALIGNMENT,
        "lm": LANGUAGE_MODEL,
        "stage2": GENERATION,
    }
    made.write(texts)
    for name in texts:
        keys = [NO_TASKS, "trainer.max_steps=2"] if name == "clip" else []
        assert main("fit", made.recipe(name), *keys) == 0, name
    return made


@pytest.fixture
def complaint(
    capsys: pytest.CaptureFixture[str], blip2_chain: Chain, tmp_path: Path
) -> Callable[..., str]:
    """`(recipe, *keys)` -> the one line that the command line says about a mistake."""

    def complain(recipe: str, *keys: str) -> str:
        capsys.readouterr()
        assert main("fit", blip2_chain.recipe(recipe), f"run_dir={tmp_path}/run", *keys) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        lines = printed.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return complain
