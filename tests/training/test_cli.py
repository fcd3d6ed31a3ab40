"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from latentmodal.experiments import cli
from latentmodal.experiments.ablation.config import shipped_ablations
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import shipped_recipes


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the entry point, run in this process."""
    monkeypatch.setattr(sys, "argv", ["latentmodal", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_recipe_list_shows_every_recipe() -> None:
    result = CliRunner().invoke(cli.app, ["recipe", "list"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    for name in shipped_recipes():
        (line,) = [line for line in lines if line.split() and line.split()[0] == name]
        assert len(line.split()) > 3, "no description"
    for name in shipped_ablations():
        assert any(line.split()[:3] == ["ablate", name, "compares"] for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "clip/emojy"],
        ["fit", "clip/emoji", "optim.lrr=1"],
        ["fit", "clip/emoji", "resume=maybe"],
        ["recipe", "show", "clip/emoji", "seed"],
        ["eval", "nowhere"],
        ["convert", "nowhere", "out", "--to", "hf_clip"],
        ["convert", "nowhere", "out", "--to", "onnx"],
        ["data", "emoji", "enormous"],
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_debug_lets_the_traceback_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["latentmodal", "--debug", "eval", "nowhere"])
    with pytest.raises(UserError, match="no run here"):
        cli.main()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_weights_are_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main(monkeypatch, "recipe", "list")
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) is not terminal


@pytest.mark.parametrize("arguments", [["fit"], ["fitt"], ["convert", "a", "b"], ["eval", "--x"]])
def test_wrong_usage_is_code_2(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert main(monkeypatch, *arguments) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["convert", "--help"]])
def test_help(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert main(monkeypatch, *arguments) == 0


@pytest.mark.parametrize(
    ("keys", "value", "left"),
    [
        ([], False, []),
        (["resume=true"], True, []),
        (["seed=1", "resume=True", "x=2"], True, ["seed=1", "x=2"]),
        (["resume=false"], False, []),
        (["resumes=true"], False, ["resumes=true"]),
    ],
)
def test_resume_is_taken_out_of_the_overrides(
    keys: list[str], value: bool, left: list[str]
) -> None:
    assert cli._flag(keys, "resume") == value
    assert keys == left


def test_a_run_from_fit_to_eval(latentmodal: Any, tiny_recipe: Path, tmp_path: Path) -> None:
    """As a user does it: train, then evaluate another split."""
    run = tmp_path / "run"
    done = latentmodal("fit", tiny_recipe, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    for shown in ("freeze plan", "image_to_text_R@1", "chance", "tensorboard --logdir"):
        assert shown in done.stdout, shown
    assert "step 2/2" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr

    before = json.loads((run / "eval.json").read_text())["sections"]
    split = "evaluation.tasks.unseen_pairs.source.split=train"
    evaluated = latentmodal("eval", run, split)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "image_to_text_R@1" in evaluated.stdout
    after = json.loads((run / "eval.json").read_text())["sections"]
    assert after["swapped_captions"] == before["swapped_captions"]
    assert after["unseen_pairs"] != before["unseen_pairs"]
