"""BLIP-2 from end to end on tiny scenes: CLIP, stage 1 on its tower, a language model, stage 2."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentmodal.experiments import cli
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.recipe import find_recipe, load_recipe
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.parts import RunImageConfig
from latentmodal.experiments.training.checkpoints import (
    latest_checkpoint,
    read_checkpoint,
    step_of,
)

STEPS = 6

ALIGNMENT = """
base: blip2/stage1_emoji
name: tiny-stage1
run_dir: RUNS/stage1
system:
  image_encoder: {path: RUNS/clip}
  tokenizer: {path: RUNS/clip}
  bridge: {width: 32, layers: 2, mlp_dim: 32, heads: 2, num_input_positions: 9, dropout: 0.1}
  embed_dim: 16
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2}
evaluation:
  tasks:
    unseen_pairs: {source: {preset: tiny}}
    unseen_pairs_itm: {source: {preset: tiny}, top_k: 4}
    swapped_by_itc: {source: {preset: tiny}}
    swapped_by_itm: {source: {preset: tiny}}
    swapped_by_itg: {source: {preset: tiny}}
    captions: {source: {preset: tiny}, baseline: {preset: tiny}}
"""

LANGUAGE_MODEL = """
base: lm/emoji
name: tiny-lm
run_dir: RUNS/lm
system: {width: 32, layers: 1, heads: 2, mlp_dim: 32}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 3, log_every: 1}
"""

GENERATION = """
base: blip2/stage2_emoji
name: tiny-stage2
run_dir: RUNS/stage2
system:
  image_encoder: {path: RUNS/clip}
  bridge: {width: 32, layers: 2, mlp_dim: 32, heads: 2, num_input_positions: 9, dropout: 0.1}
  llm: {name: causal, gguf: null, model: RUNS/lm/llm}
  pretrained: {path: RUNS/stage1}
  generation: {max_new_tokens: 6}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2}
evaluation:
  tasks:
    unseen_pairs: {source: {preset: tiny}, baseline: {preset: tiny}}
"""

NO_TASKS = "evaluation.tasks=null"
QUESTION = "system.prompt.text='{image}{bos}Question: {question} Answer: {answer}{eos}'"
SPLIT = "source: {name: emoji, preset: tiny, split: unseen_pairs}"
ASKED = f"evaluation.tasks.asked={{name: vqa, scoring: exact, {SPLIT}}}"
CAPTIONS = f"evaluation.tasks.said={{name: captions, {SPLIT}}}"
ITM = f"evaluation.tasks.found={{name: itm_retrieval, {SPLIT}}}"


def main(*arguments: object) -> int:
    """The exit code of the command line, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latentmodal", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@dataclass(frozen=True)
class Chain:
    """Recipes and runs of the four trainings, each made once."""

    recipes: Path
    runs: Path

    def recipe(self, name: str) -> Path:
        return self.recipes / f"{name}.yaml"

    def run(self, name: str) -> Path:
        return self.runs / name


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path, tiny_clip: str) -> Chain:
    made = Chain(tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("runs"))
    texts = {
        "clip": f"{tiny_clip}run_dir: RUNS/clip\n",
        "stage1": ALIGNMENT,
        "lm": LANGUAGE_MODEL,
        "stage2": GENERATION,
    }
    for name, text in texts.items():
        made.recipe(name).write_text(text.replace("RUNS", str(made.runs)))
        keys = [NO_TASKS, "trainer.max_steps=2"] if name == "clip" else []
        assert main("fit", made.recipe(name), *keys) == 0, name
    return made


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()


def scalars(run: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events(run).Scalars(tag)}


def checkpoint(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return {**read_checkpoint(path), "path": path}


def sections(file: Path) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = json.loads(file.read_text())["sections"]
    return content


def assert_finite(found: dict[str, dict[str, Any]]) -> None:
    for name, metrics in found.items():
        assert metrics, name
        for metric, entry in metrics.items():
            assert math.isfinite(entry["value"]), f"{name}/{metric}"


def test_stage_1_is_evaluated_in_every_way(chain: Chain) -> None:
    found = sections(chain.run("stage1") / "eval.json")
    assert set(found) == {
        "unseen_pairs",
        "unseen_pairs_itm",
        "swapped_by_itc",
        "swapped_by_itm",
        "swapped_by_itg",
        "captions",
    }
    assert_finite(found)


def test_stage_2_is_evaluated_before_and_after(chain: Chain) -> None:
    run = chain.run("stage2")
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
    chain: Chain, stage: str, names: list[str]
) -> None:
    seen = events(chain.run(stage))
    for name in ["loss", "lr", *names]:
        curve = {event.step: event.value for event in seen.Scalars(f"train/{name}")}
        assert list(curve) == list(range(1, STEPS + 1)), name
        assert all(math.isfinite(value) for value in curve.values()), name
    assert {"views/query_attention", "views/captions"} <= set(seen.Tags()["images"])


def test_the_losses_of_stage_1_add_up(chain: Chain) -> None:
    run = chain.run("stage1")
    parts = [scalars(run, f"train/{name}") for name in ("itc", "itm", "itg")]
    for step, total in scalars(run, "train/loss").items():
        assert total == pytest.approx(sum(part[step] for part in parts), rel=1e-5)
    assert all(0 <= value <= 1 for value in scalars(run, "train/itm_accuracy").values())
    assert all(-1 <= value <= 1 for value in scalars(run, "train/negative_similarity").values())


@pytest.mark.parametrize(
    ("stage", "parts"), [("stage1", {"bridge", "head"}), ("stage2", {"bridge"})]
)
def test_a_checkpoint_holds_only_what_trains(chain: Chain, stage: str, parts: set[str]) -> None:
    saved = checkpoint(chain.run(stage))
    # A frozen tower's statistics are buffers, and few.
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    weights = [name for name in saved["state_dict"] if not name.endswith(statistics)]
    assert {name.split(".")[1] for name in weights} == parts
    assert saved["path"].stat().st_size < 1_000_000
    assert len(saved["frozen_fingerprint"]) == 64, "and what it was trained on is known"


def test_stage_2_begins_with_the_bridge_of_stage_1(chain: Chain) -> None:
    model = load_recipe(str(chain.run("stage2") / "recipe.yaml")).system.build_model()
    ours = model.bridge.state_dict()
    theirs = checkpoint(chain.run("stage1"))["state_dict"]
    new = {name for name in ours if f"model.bridge.{name}" not in theirs}
    assert new == {"proj.weight", "proj.bias"}
    assert all(
        torch.equal(tensor, theirs[f"model.bridge.{name}"])
        for name, tensor in ours.items()
        if name not in new
    )
    assert not any("text_mlp" in name or "word_embed" in name for name in ours)
    clip = checkpoint(chain.run("clip"))["state_dict"]
    tower = model.image_encoder.state_dict()
    assert tower and all(
        torch.equal(tensor, clip[f"model.image_encoder.{name}"]) for name, tensor in tower.items()
    )


def test_the_tower_of_a_run_that_froze_it_is_the_tower_it_was_given(chain: Chain) -> None:
    first = RunImageConfig(path=str(chain.run("clip"))).build().state_dict()
    second = RunImageConfig(path=str(chain.run("stage1"))).build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_figures_of_a_run_come_again(chain: Chain, stage: str, tmp_path: Path) -> None:
    """From its checkpoint alone, with the frozen parts built anew."""
    run = shutil.copytree(chain.run(stage), tmp_path / "run")
    (run / "eval.json").unlink()
    assert main("eval", run) == 0
    assert sections(run / "eval.json") == sections(chain.run(stage) / "eval.json")


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_interrupted_run_equals_uninterrupted_one(
    chain: Chain, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ("fit", chain.recipe(stage), f"run_dir={run}", NO_TASKS)
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

    ours, theirs = final_state(run), final_state(chain.run(stage))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert scalars(run, "train/loss") == scalars(chain.run(stage), "train/loss")


def final_state(run: Path) -> dict[str, torch.Tensor]:
    saved = checkpoint(run)
    assert step_of(saved["path"]) == STEPS
    moments = saved["optimizer_states"][0]["state"]
    flat = {f"{n}.{k}": v for n, state in moments.items() for k, v in state.items()}
    return {**saved["state_dict"], **flat}


@pytest.mark.parametrize(
    ("shipped", "queries", "absent_scalars", "absent_weights"),
    [
        ("no_itg", 8, {"train/itg"}, "model.bridge.caption_head."),
        ("no_itm", 8, {"train/itm", "train/itm_accuracy"}, "model.head.itm_head."),
        ("16_queries", 16, set(), None),
    ],
)
def test_the_shipped_variations_of_stage_1_run(
    chain: Chain,
    tmp_path: Path,
    shipped: str,
    queries: int,
    absent_scalars: set[str],
    absent_weights: str | None,
) -> None:
    """The shipped files themselves, with the tiny recipe under them."""
    text = find_recipe(f"blip2/stage1_emoji_{shipped}").read_text()
    assert "base: blip2/stage1_emoji\n" in text
    recipe = tmp_path / "variation.yaml"
    recipe.write_text(text.replace("blip2/stage1_emoji\n", f"{chain.recipe('stage1')}\n"))
    run = tmp_path / "run"
    assert main("fit", recipe, f"run_dir={run}", "trainer.max_steps=2") == 0
    state = checkpoint(run)["state_dict"]
    assert state["model.bridge.queries"].shape == (1, queries, 32)
    if absent_weights is not None:
        whole = checkpoint(chain.run("stage1"))["state_dict"]
        assert any(name.startswith(absent_weights) for name in whole)
        assert not any(name.startswith(absent_weights) for name in state)
    shown = set(events(run).Tags()["scalars"])
    every = {f"train/{name}" for name in ("itc", "itm", "itg", "itm_accuracy")}
    assert every - shown == absent_scalars
    assert_finite(sections(run / "eval.json"))


VARIATIONS = {
    "linear": """
system: {bridge: {name: linear}, pretrained: null}
""",
    "lora": """
system: {llm: {lora: {rank: 2}}}
freeze: {"*lora_*": 1.0, "image_encoder.*": frozen, "llm.*": frozen}
""",
}


@pytest.mark.parametrize(
    ("name", "trains"),
    [("linear", {"bridge.proj"}), ("lora", {"bridge.queries", "llm.model"})],
)
def test_variations_of_stage_2_run(
    chain: Chain, tmp_path: Path, name: str, trains: set[str]
) -> None:
    recipe, run = tmp_path / "variation.yaml", tmp_path / "run"
    recipe.write_text(f"base: {chain.recipe('stage2')}\nname: mine\n{VARIATIONS[name]}")
    assert main("fit", recipe, f"run_dir={run}", "trainer.max_steps=2") == 0
    state = checkpoint(run)["state_dict"]
    assert trains <= {".".join(key.split(".")[1:3]) for key in state}
    of_llm = [key for key in state if key.startswith("model.llm.")]
    assert all("lora_" in key for key in of_llm)
    assert main("eval", run) == 0


@pytest.fixture(scope="module")
def answers(chain: Chain) -> Path:
    """A stage 2 that answers questions."""
    run = chain.run("answers")
    tasks = ["evaluation.tasks.unseen_pairs=null", ASKED]
    keys = ["system.target=answer", QUESTION, *tasks]
    assert main("fit", chain.recipe("stage2"), f"run_dir={run}", "trainer.max_steps=2", *keys) == 0
    return run


def test_answers_are_trained_and_scored(answers: Path) -> None:
    (name, found), *others = sections(answers / "eval.json").items()
    assert name == "asked" and not others
    assert_finite({name: found})
    assert all(0 <= entry["value"] <= 1 for entry in found.values())
    assert max(entry["n"] for entry in found.values()) > 24, "several questions to a scene"
    assert "views/captions" not in events(answers).Tags()["images"], "nobody asked anything"


def test_answers_and_descriptions_are_judged_for_things_that_are_not_there(
    answers: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(answers, tmp_path / "run")
    plain = "prompt: {text: '{image}{bos}{answer}{eos}'}"
    pope = f"evaluation.tasks.pope={{name: pope, per_picture: 1, {SPLIT}}}"
    said = f"evaluation.tasks.said={{name: descriptions, {plain}, {SPLIT}}}"
    assert main("eval", run, "evaluation.tasks.asked=null", pope, said) == 0
    found = sections(run / "eval.json")
    assert {name.partition("/")[0] for name in found["pope"]} == {
        "random",
        "popular",
        "adversarial",
    }
    assert found["pope"]["popular/accuracy"]["n"] == 2 * found["said"]["words"]["n"]
    assert {"words", "tokens", "repeats", "unfinished", "CHAIRi", "CHAIRs"} <= set(found["said"])
    tags = set(events(run).Tags()["scalars"])
    assert {"eval/pope/random/accuracy", "eval/said/CHAIRs"} <= tags


@pytest.fixture
def complaint(
    capsys: pytest.CaptureFixture[str], chain: Chain, tmp_path: Path
) -> Callable[..., str]:
    """`(recipe, *keys)` -> the one line that the command line says about a mistake."""

    def complain(recipe: str, *keys: str) -> str:
        capsys.readouterr()
        assert main("fit", chain.recipe(recipe), f"run_dir={tmp_path}/run", *keys) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        lines = printed.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        return lines[-1]

    return complain


@pytest.fixture
def captions_only(tmp_path: Path) -> str:
    """A source whose samples have a caption and no questions."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "PNG")
    samples = ({"__key__": f"{i}", "png": buffer.getvalue(), "txt": "a cat"} for i in range(8))
    (path,) = write_shards(samples, tmp_path / "plain", 8)
    return f"{{name: shards, urls: {path}}}"


@pytest.mark.parametrize(
    ("recipe", "keys", "reason"),
    [
        ("stage1", ["system.image_encoder.path=nowhere"], "nowhere: no run here (recipe.yaml is"),
        ("stage2", ["system.pretrained.path=nowhere"], "nowhere: no run here (recipe.yaml is"),
        ("stage2", ["system.pretrained.path=CLIP"], "is a run without a bridge"),
        ("stage2", ["system.bridge.width=16"], "does not fit the recipe: bridge.queries is"),
        ("stage2", ["system.llm.model=/nowhere/llm"], "'/nowhere/llm' is neither a local folder"),
        ("stage2", ["system.llm.model=CLIP"], "is a folder without config.json"),
        ("stage2", ["system.prompt.text='{image}{bos}'"], "has 0 {answer} fields; write one"),
        ("stage2", ["system.prompt.prefix_split=true"], "prefix_split needs a seq2seq model"),
        ("clip", [CAPTIONS], "evaluation.tasks.said: captions need a system that"),
        ("clip", [ASKED], "evaluation.tasks.asked: questions need a system with a"),
        ("stage1", [ASKED], "evaluation.tasks.asked: questions need a system with a"),
        ("stage1", ["system.objectives.itm=0"], "evaluation.tasks.unseen_pairs_itm: scoring by"),
        ("stage1", ["system.objectives.itc=0"], "evaluation.tasks.unseen_pairs: retrieval, nam"),
        ("stage1", ["system.objectives.itg=0"], "evaluation.tasks.swapped_by_itg: scoring by"),
        ("clip", [ITM], "evaluation.tasks.found: scoring by itm needs"),
        ("stage2", [ITM], "evaluation.tasks.found: retrieval, naming"),
        # What a caption or an answer is asked with lacks or wants the question.
        ("stage2", ["system.target=answer", QUESTION], "evaluation.tasks.unseen_pairs: the prompt"),
        ("stage2", [ASKED], "evaluation.tasks.asked: the prompt"),
    ],
)
def test_a_mistake_is_one_line_and_found_before_training(
    complaint: Callable[..., str], chain: Chain, recipe: str, keys: list[str], reason: str
) -> None:
    keys = [key.replace("CLIP", str(chain.run("clip"))) for key in keys]
    assert reason in complaint(recipe, *keys)


def test_questions_are_asked_of_a_source_that_has_them(
    complaint: Callable[..., str], captions_only: str
) -> None:
    train = [f"data.train=[{captions_only}]", "data.loader.shuffle_window=8"]
    answer = ["system.target=answer", QUESTION, "trainer.max_steps=1", NO_TASKS]
    assert "has no questions in its json; system.target=answer" in complaint(
        "stage2", *answer, *train
    )


def test_a_source_without_questions_cannot_be_evaluated_on_them(
    answers: Path, captions_only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    source = f"evaluation.tasks.asked.source={captions_only}"
    assert main("eval", answers, source) == 2
    printed = capsys.readouterr().err.splitlines()
    assert (
        printed[-1].startswith("error: ") and "no sample has questions in its json" in printed[-1]
    )
