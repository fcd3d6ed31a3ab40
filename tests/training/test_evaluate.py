"""`latentmodal eval`: the same figures again, other splits, and refusals in one line."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finished_runs import sections
from latentmodal.experiments.evaluation.run import evaluate_run
from latentmodal.experiments.training.checkpoints import VerifiedCheckpointIO, read_checkpoint
from latentmodal.experiments.training.run_folder import RunFolder
from one_line import one_line


def evaluate(run: Path, *overrides: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    evaluate_run(run, list(overrides), console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def complaint(run: Path, *overrides: str) -> str:
    return one_line(lambda: evaluate(run, *overrides))


def assert_close(left: Any, right: Any) -> None:
    """Equal but for the rounding another batch size brings."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key])
    elif isinstance(left, float):
        assert left == pytest.approx(right) or (math.isnan(left) and math.isnan(right))
    else:
        assert left == right


def test_the_figures_of_the_run_come_again(finished_run: Path) -> None:
    before = sections(finished_run / "eval.json")
    printed = evaluate(finished_run, "evaluation.batch_size=5")
    assert_close(sections(finished_run / "eval.json"), before)
    assert f"written to {finished_run / 'eval.json'}" in printed
    assert set(before) == {
        "unseen_pairs",
        "swapped_captions",
        "naming_unseen_style",
        "naming_seen_styles",
        "naming_unseen_things",
    }


def test_another_split_and_another_task(finished_run: Path) -> None:
    evaluate(
        finished_run,
        "evaluation.tasks.swapped_captions=null",
        "evaluation.tasks.naming_unseen_style=null",
        "evaluation.tasks.naming_seen_styles=null",
        "evaluation.tasks.naming_unseen_things=null",
        "evaluation.tasks.unseen_pairs.source.split=train",
        "evaluation.tasks.mine={name: retrieval, captions: first, ks: [2], "
        "source: {name: emoji, preset: tiny, split: unseen_pairs}}",
    )
    found = sections(finished_run / "eval.json")
    assert set(found) == {"unseen_pairs", "mine"}
    assert found["unseen_pairs"]["image_to_text_R@1"]["n"] > found["mine"]["image_to_text_R@2"]["n"]
    assert "image_to_text_R@1" not in found["mine"]
    # The recipe the run was trained with is left as it was.
    assert "split: train" not in (finished_run / "recipe.yaml").read_text().split("evaluation:")[1]


def test_tensorboard_has_the_figures(finished_run: Path) -> None:
    for path in (finished_run / "tensorboard").glob("events*"):
        path.unlink()
    evaluate(finished_run)
    events = EventAccumulator(str(finished_run / "tensorboard")).Reload()
    (tag,) = [
        tag for tag in events.Tags()["scalars"] if tag.endswith("unseen_pairs/image_to_text_R@1")
    ]
    (event,) = events.Scalars(tag)
    assert event.step == 6
    value = sections(finished_run / "eval.json")["unseen_pairs"]["image_to_text_R@1"]["value"]
    assert event.value == pytest.approx(value)
    assert events.Tags()["images"]


@pytest.mark.parametrize(
    "override", ["optim.lr=1", "seed=1", "evaluate.batch_size=2", "resume=true"]
)
def test_only_evaluation_may_change(finished_run: Path, override: str) -> None:
    assert complaint(finished_run, "evaluation.batch_size=4", override) == (
        f"{override}: only keys under evaluation. can be changed for a trained run"
    )


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("evaluation.batchsize=2", "evaluation.batchsize: no such key; did you mean 'batch_size'?"),
        ("evaluation.batch_size=0", "evaluation: batch_size is 0; give 1 or more"),
        (
            "evaluation.tasks.unseen_pairs.source.split=unseen_pair",
            "the emoji scenes have no split 'unseen_pair'; choose from ",
        ),
        ("evaluation.tasks.mine={name: recall}", "evaluation.tasks.mine.name: unknown name"),
        ("evaluation.views=none", "evaluation: views is 'none', which is no task"),
        ("evaluation.tasks=null", "evaluation.tasks is empty; name at least one task"),
        (
            "evaluation.tasks.unseen_pairs.source={name: shards, urls: nowhere.tar}",
            "nowhere.tar",
        ),
        (
            "evaluation.tasks.swapped_captions.negatives=[colour_swap]",
            "no sample has negatives of kind colour_swap",
        ),
        (
            "evaluation.tasks.naming_unseen_style.label=object.0.name",
            "label='object.0.name' is not in the json of sample 0",
        ),
    ],
)
def test_mistakes(finished_run: Path, override: str, reason: str) -> None:
    before = (finished_run / "eval.json").read_bytes()
    assert reason in complaint(finished_run, override)
    assert (finished_run / "eval.json").read_bytes() == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path}: no run here (recipe.yaml is missing)"
    assert "no run here" in complaint(tmp_path / "nowhere")


def test_a_run_without_a_checkpoint(finished_run: Path) -> None:
    for path in (finished_run / "checkpoints").iterdir():
        path.unlink()
    assert "holds no intact checkpoint; train first" in complaint(finished_run)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("depth: 1", "depth: 2", "lacks model.text_encoder.blocks.1."),
        ("init_logit_bias: null", "init_logit_bias: -1.0", "lacks model.head.logit_bias"),
        ("embed_dim: 16", "embed_dim: 8", "size mismatch for model.head"),
    ],
)
def test_a_recipe_changed_behind_its_checkpoint(
    finished_run: Path, old: str, new: str, reason: str
) -> None:
    recipe = finished_run / "recipe.yaml"
    text = recipe.read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))
    assert reason in complaint(finished_run)


def test_a_checkpoint_that_holds_more_than_the_model(finished_run: Path) -> None:
    path = RunFolder(finished_run).checkpoint()
    content = read_checkpoint(path)
    content["state_dict"]["model.head.extra"] = torch.zeros(1)
    VerifiedCheckpointIO().save_checkpoint(content, path)
    message = complaint(finished_run)
    assert message == f"{path}: holds model.head.extra; it is of another recipe"
