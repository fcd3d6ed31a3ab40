"""The folder of one run: its resolved recipe, where it came from, its checkpoints and its logs."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.files import write_text_atomically
from latentmodal.experiments.recipe import load_recipe, to_yaml
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.training.checkpoints import latest_checkpoint

_RECORDED = (
    "latentmodal",
    "latentmodal-bridges",
    "latentmodal-encoders",
    "latentmodal-llm",
    "torch",
    "lightning",
    "transformers",
    "timm",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder, and what is read from and written to them."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer_file(self) -> Path:
        """The word tokenizer a run made from its own captions, if it did."""
        return self.path / "tokenizer.json"

    @property
    def logs(self) -> Path:
        """What TensorBoard reads; there from the first training step on."""
        return self.path / "tensorboard"

    def evaluation_file(self, step: int) -> Path:
        """What an evaluation on the way found; the one at the end is `eval.json`."""
        return self.path / "evaluations" / f"step={step:08d}.json"

    @property
    def cost_file(self) -> Path:
        """What training took; there once the last step was trained."""
        return self.path / "cost.json"

    @property
    def finished_file(self) -> Path:
        """Present once the last step was trained."""
        return self.path / "finished.json"

    def open(self, recipe: Recipe, resume: bool) -> Path | None:
        """Prepare the folder for training; the checkpoint to go on from, or None to begin.

        A run that a mistake in its recipe stopped before the first step is begun anew.

        Raises:
            UserError: the folder holds a run and `resume` is off, holds a run of another recipe,
                or cannot be written.
        """
        text = to_yaml(recipe)
        if self.recipe_file.exists() and (self.logs.exists() or self.checkpoints.exists()):
            if not resume:
                raise UserError(
                    f"{self.path}: already holds a run; go on with resume=true, "
                    "or start another with run_dir=FOLDER"
                )
            self._check_same(recipe)
            write_text_atomically(self.recipe_file, text)
            return latest_checkpoint(self.checkpoints)
        self.tokenizer_file.unlink(missing_ok=True)
        write_text_atomically(self.recipe_file, text)
        write_text_atomically(self.path / "provenance.json", json.dumps(provenance(), indent=2))
        return None

    def _check_same(self, recipe: Recipe) -> None:
        """Refuse to resume under another recipe; how long and on what it runs may change.

        A key newer than the run has its default there: that is what the run was trained with.
        """
        old, new = _comparable(self.recipe()), _comparable(recipe)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            raise UserError(
                f"{self.path}: holds a run with another {', '.join(changed[:4])}; "
                "give the same values, or start another with run_dir=FOLDER"
            )

    def recipe(self) -> Recipe:
        """The recipe this run was trained with.

        Raises:
            UserError: the folder is no run.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.path}: no run here (recipe.yaml is missing)")
        return load_recipe(str(self.recipe_file))

    def checkpoint(self) -> Path:
        """The newest intact checkpoint.

        Raises:
            UserError: there is none.
        """
        path = latest_checkpoint(self.checkpoints)
        if path is None:
            raise UserError(f"{self.checkpoints}: holds no intact checkpoint; train first")
        return path


# Keys that change where and how fast a run goes, not what it computes at the next step.
_FREE = ("run_dir", "description", "trainer.", "evaluation.", "data.loader.prefetch")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = node

    walk(yaml.safe_load(to_yaml(recipe)), "")
    kept = {key: value for key, value in flat.items() if not key.startswith(_FREE)}
    # The cosine is laid out over max_steps: another length is another schedule.
    for name in ("trainer.max_steps", "trainer.precision"):
        kept[name] = flat.get(name)
    return kept


def provenance() -> dict[str, Any]:
    """Git revision, package versions and interpreter behind a run."""
    return {
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _RECORDED},
    }


def _git(*arguments: str) -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
