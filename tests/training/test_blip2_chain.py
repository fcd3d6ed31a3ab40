"""BLIP-2 from end to end on tiny scenes: what its trainings log, save and take up again."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2_recipes import NO_TASKS, STEPS
from command_line import main
from finished_runs import Chain, assert_finite, checkpoint, events, final_state, scalars, sections
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.parts import RunImageConfig
from latentmodal.experiments.training.checkpoints import step_of


def test_stage_1_is_evaluated_in_every_way(blip2_chain: Chain) -> None:
    found = sections(blip2_chain.run("stage1") / "eval.json")
    assert set(found) == {
        "unseen_pairs",
        "unseen_pairs_itm",
        "swapped_by_itc",
        "swapped_by_itm",
        "swapped_by_itg",
        "captions",
    }
    assert_finite(found)


def test_stage_2_is_evaluated_before_and_after(blip2_chain: Chain) -> None:
    run = blip2_chain.run("stage2")
    before = sections(run / "evaluations" / "step=00000000.json")
    after = sections(run / "eval.json")
    assert set(before) == set(after) == {"unseen_pairs"}
    assert_finite(before)
    assert_finite(after)
    assert all("most frequent" in entry["protocol"] for entry in after["unseen_pairs"].values())


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("stage1", ["itc", "itm", "itg", "itm_accuracy", "negative_similarity", "temperature"]),
        ("stage2", []),
    ],
)
def test_tensorboard_shows_each_loss_and_what_the_queries_see(
    blip2_chain: Chain, stage: str, names: list[str]
) -> None:
    seen = events(blip2_chain.run(stage))
    for name in ["loss", "lr", *names]:
        curve = {event.step: event.value for event in seen.Scalars(f"train/{name}")}
        assert list(curve) == list(range(1, STEPS + 1)), name
        assert all(math.isfinite(value) for value in curve.values()), name
    assert {"views/query_attention", "views/captions"} <= set(seen.Tags()["images"])


def test_the_losses_of_stage_1_add_up(blip2_chain: Chain) -> None:
    run = blip2_chain.run("stage1")
    parts = [scalars(run, f"train/{name}") for name in ("itc", "itm", "itg")]
    for step, total in scalars(run, "train/loss").items():
        assert total == pytest.approx(sum(part[step] for part in parts), rel=1e-5)
    assert all(0 <= value <= 1 for value in scalars(run, "train/itm_accuracy").values())
    assert all(-1 <= value <= 1 for value in scalars(run, "train/negative_similarity").values())


@pytest.mark.parametrize(
    ("stage", "parts"), [("stage1", {"bridge", "head"}), ("stage2", {"bridge"})]
)
def test_a_checkpoint_holds_only_what_trains(
    blip2_chain: Chain, stage: str, parts: set[str]
) -> None:
    saved = checkpoint(blip2_chain.run(stage))
    # A frozen tower's statistics are buffers, and few.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    weights = [name for name in saved["state_dict"] if not name.endswith(statistics)]
    assert {name.split(".")[1] for name in weights} == parts
    assert saved["path"].stat().st_size < 1_000_000
    assert len(saved["frozen_fingerprint"]) == 64, "and what it was trained on is known"


def test_stage_2_begins_with_the_bridge_of_stage_1(blip2_chain: Chain) -> None:
    model = load_recipe(str(blip2_chain.run("stage2") / "recipe.yaml")).system.build_model()
    ours = model.bridge.state_dict()
    theirs = checkpoint(blip2_chain.run("stage1"))["state_dict"]
    new = {name for name in ours if f"model.bridge.{name}" not in theirs}
    assert new == {"proj.weight", "proj.bias"}
    assert all(
        torch.equal(tensor, theirs[f"model.bridge.{name}"])
        for name, tensor in ours.items()
        if name not in new
    )
    assert not any("text_mlp" in name or "word_embed" in name for name in ours)
    clip = checkpoint(blip2_chain.run("clip"))["state_dict"]
    tower = model.image_encoder.state_dict()
    assert tower and all(
        torch.equal(tensor, clip[f"model.image_encoder.{name}"]) for name, tensor in tower.items()
    )


def test_the_tower_of_a_run_that_froze_it_is_the_tower_it_was_given(blip2_chain: Chain) -> None:
    first = RunImageConfig(path=str(blip2_chain.run("clip"))).build().state_dict()
    second = RunImageConfig(path=str(blip2_chain.run("stage1"))).build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_figures_of_a_run_come_again(blip2_chain: Chain, stage: str, tmp_path: Path) -> None:
    """From its checkpoint alone, with the frozen parts built anew."""
    run = shutil.copytree(blip2_chain.run(stage), tmp_path / "run")
    (run / "eval.json").unlink()
    assert main("eval", run) == 0
    assert sections(run / "eval.json") == sections(blip2_chain.run(stage) / "eval.json")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_interrupted_run_equals_uninterrupted_one(
    blip2_chain: Chain, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ("fit", blip2_chain.recipe(stage), f"run_dir={run}", NO_TASKS)
    check = System.check_finite

    def cut_off(self: System, *arguments: Any) -> None:
        if self.global_step == 5:
            raise RuntimeError("power cut")
        check(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(System, "check_finite", cut_off)
        with pytest.raises(RuntimeError, match="power cut"):
            main(*command)
    assert step_of(checkpoint(run)["path"]) == 4
    assert main(*command, "resume=true") == 0

    ours, theirs = final_state(run, STEPS), final_state(blip2_chain.run(stage), STEPS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert scalars(run, "train/loss") == scalars(blip2_chain.run(stage), "train/loss")
