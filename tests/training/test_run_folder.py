"""A run's folder: begun once, gone on with on purpose, and sure of where it came from."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finished_runs import scalars
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems import contrastive
from latentmodal.experiments.training import fit as fit_module
from latentmodal.experiments.training.checkpoints import read_checkpoint
from latentmodal.experiments.training.run_folder import RunFolder

Fit = Callable[..., str]
NO_TASKS = "evaluation={tasks: null}"


def complaint(fit: Fit, *overrides: str, resume: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        fit(*overrides, resume=resume)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_run_leaves(finished_run: Path, tiny_recipe: Path) -> None:
    assert {path.name for path in finished_run.iterdir()} == {
        "recipe.yaml",
        "provenance.json",
        "tokenizer.json",
        "checkpoints",
        "tensorboard",
        "evaluations",
        "eval.json",
        "cost.json",
        "finished.json",
    }
    on_the_way = [path.name for path in (finished_run / "evaluations").iterdir()]
    assert on_the_way == ["step=00000004.json"]
    kept, given = RunFolder(finished_run).recipe(), load_recipe(str(tiny_recipe))
    assert (kept.system, kept.data, kept.optim) == (given.system, given.data, given.optim)
    assert json.loads((finished_run / "finished.json").read_text()) == {"step": 6}


def test_provenance(finished_run: Path) -> None:
    told = json.loads((finished_run / "provenance.json").read_text())
    assert told["git"] is None or re.fullmatch(r"[0-9a-f]{40}", told["git"])
    assert isinstance(told["git_dirty"], bool)
    assert told["packages"]["torch"] == version("torch")
    assert {"latentmodal", "latentmodal-bridges", "lightning", "timm"} <= told["packages"].keys()
    assert re.match(r"3\.\d+", told["python"])


def test_a_taken_folder_is_not_trained_over(fit: Fit, finished_run: Path) -> None:
    before = (finished_run / "eval.json").read_bytes()
    assert complaint(fit) == (
        f"{finished_run}: already holds a run; go on with resume=true, "
        "or start another with run_dir=FOLDER"
    )
    assert (finished_run / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["seed=1"], "seed"),
        (["optim.lr=0.5", "data.loader.batch_size=4"], "data.loader.batch_size, optim.lr"),
        (["trainer.max_steps=7"], "trainer.max_steps"),
        (["freeze[image_encoder.*]=frozen"], "freeze.image_encoder.*"),
        (["system.head.embed_dim=8"], "system.head.embed_dim"),
    ],
)
def test_another_recipe_is_not_gone_on_with(
    fit: Fit, finished_run: Path, overrides: list[str], keys: str
) -> None:
    message = complaint(fit, *overrides, resume=True)
    assert message == (
        f"{finished_run}: holds a run with another {keys}; "
        "give the same values, or start another with run_dir=FOLDER"
    )


def test_a_finished_run_shows_its_report_again(
    fit: Fit, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_training(*_: Any) -> Any:
        raise AssertionError("it trained again")

    monkeypatch.setattr(fit_module, "_train_loader", no_training)
    # What only says how a run is watched may be given anew.
    printed = fit("trainer.log_every=3", "evaluation.batch_size=3", resume=True)
    assert "already trained to its last step" in printed
    assert "unseen_pairs" in printed and "image_to_text_R@1" in printed
    assert f"tensorboard --logdir {finished_run.parent.parent}" in printed


def test_a_run_older_than_a_key_has_its_default(fit: Fit, finished_run: Path) -> None:
    recipe = yaml.safe_load((finished_run / "recipe.yaml").read_text())
    assert recipe["data"]["augment"].pop("flip") is False
    assert recipe["optim"].pop("layer_decay") == {}
    (finished_run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "already trained to its last step" in fit(resume=True)
    assert "another data.augment.flip" in complaint(fit, "data.augment.flip=true", resume=True)


def test_resume_begins_where_there_is_nothing_yet(fit: Fit, tmp_path: Path) -> None:
    printed = fit(NO_TASKS, "trainer.max_steps=2", resume=True)
    assert "going on" not in printed
    assert RunFolder(tmp_path / "run").finished_file.exists()


@pytest.mark.parametrize(("every", "logged"), [(20, [5]), (2, [2, 4, 5])])
def test_the_last_step_is_logged_however_few_there_are(
    fit: Fit, tmp_path: Path, every: int, logged: list[int]
) -> None:
    fit(NO_TASKS, "trainer.max_steps=5", f"trainer.log_every={every}")
    assert list(scalars(tmp_path / "run", "train/loss")) == logged


def test_a_start_that_failed_does_not_take_the_folder(fit: Fit, tmp_path: Path) -> None:
    """Nor does its word list outlive it: the mended recipe learns its own."""
    short = (NO_TASKS, "trainer.max_steps=2")
    message = complaint(
        fit, *short, "system.text_encoder.vocab_size=8", "freeze[imag_encoder.*]=frozen"
    )
    assert "pattern 'imag_encoder.*' matches no parameter" in message
    run = RunFolder(tmp_path / "run")
    assert run.recipe_file.exists() and run.tokenizer_file.exists()
    fit(*short)
    assert run.finished_file.exists()
    assert run.recipe().system.text_encoder.vocab_size > 8
    assert len(json.loads(run.tokenizer_file.read_text())["model"]["vocab"]) > 8


def test_a_lost_log_does_not_lose_the_run(fit: Fit, finished_run: Path) -> None:
    for path in sorted((finished_run / "tensorboard").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (finished_run / "tensorboard").rmdir()
    assert "already holds a run" in complaint(fit)


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run here \(recipe\.yaml is missing\)"):
        RunFolder(tmp_path).recipe()
    with pytest.raises(UserError, match="holds no intact checkpoint; train first"):
        RunFolder(tmp_path).checkpoint()


def test_a_broken_loss_stops_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def breaks_at_the_third(image_BE: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        calls.append(1)
        return image_BE.sum() * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(contrastive, "info_nce", breaks_at_the_third)
    message = complaint(fit, NO_TASKS)
    assert re.search(
        r"the loss is nan at step 2 \(samples \S+, \S+, \S+, \S+, …\); lower optim\.lr", message
    )
    assert "resume=true" in message
    content = read_checkpoint(RunFolder(tmp_path / "run").checkpoint())
    assert content["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in content["state_dict"].values())

    monkeypatch.undo()
    assert "step=00000002.ckpt" in fit(NO_TASKS, resume=True)


def test_a_learning_rate_beyond_reason_is_noticed(fit: Fit) -> None:
    message = complaint(fit, NO_TASKS, "optim.lr=1e30", "optim.warmup_steps=0")
    assert "the loss is nan at step 1" in message


def test_the_temperature_stops_at_a_hundred(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wants_it_hotter(
        image_BE: torch.Tensor, text_BE: torch.Tensor, logit_scale: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        return -logit_scale.log().sum() + 0 * (image_BE.sum() + text_BE.sum())

    monkeypatch.setattr(contrastive, "info_nce", wants_it_hotter)
    fit(NO_TASKS, "optim.lr=1.0", "optim.warmup_steps=0", "optim.weight_decay=0.9")
    run = RunFolder(tmp_path / "run")
    scale = read_checkpoint(run.checkpoint())["state_dict"]["model.head.logit_scale"]
    assert scale.exp().item() == pytest.approx(100.0, rel=1e-5)
    events = EventAccumulator(str(run.logs)).Reload().Scalars("train/logit_scale")
    assert len(events) == 6
    assert max(event.value for event in events) == pytest.approx(100.0, rel=1e-5)
    assert events[0].value == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_temperature_is_not_decayed(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does_not_care(image_BE: torch.Tensor, text_BE: torch.Tensor, scale: Any, **_: Any) -> Any:
        return 0 * (image_BE.sum() + text_BE.sum() + scale.sum())

    monkeypatch.setattr(contrastive, "info_nce", does_not_care)
    fit(
        NO_TASKS,
        "optim.lr=0.1",
        "optim.weight_decay=1.0",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=6",
    )
    folder = RunFolder(tmp_path / "run").checkpoints
    first, last = (
        read_checkpoint(folder / f"step=0000000{step}.ckpt")["state_dict"] for step in (1, 6)
    )
    assert torch.equal(first["model.head.logit_scale"], last["model.head.logit_scale"])
    matrix = "model.head.image_proj.weight"
    assert last[matrix].norm() < 0.99 * first[matrix].norm()


def test_progress_is_told_line_by_line_in_a_file(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="latentmodal"):
        fit(NO_TASKS)
    steps = [r.getMessage().split()[1] for r in caplog.records if r.getMessage()[:5] == "step "]
    assert steps == [f"{step}/6" for step in range(1, 7)]
