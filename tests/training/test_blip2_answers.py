"""BLIP-2's second stage on questions: trained, scored and judged."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from blip2_recipes import ASKED, NO_TASKS, QUESTION, SPLIT
from command_line import main
from finished_runs import Chain, assert_finite, events, sections
from latentmodal.experiments.data.shard_writer import write_shards


@pytest.fixture(scope="module")
def answers(blip2_chain: Chain) -> Path:
    """A stage 2 that answers questions."""
    run = blip2_chain.run("answers")
    tasks = ["evaluation.tasks.unseen_pairs=null", ASKED]
    keys = ["system.target=answer", QUESTION, *tasks]
    assert (
        main("fit", blip2_chain.recipe("stage2"), f"run_dir={run}", "trainer.max_steps=2", *keys)
        == 0
    )
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
def captions_only(tmp_path: Path) -> str:
    """A source whose samples have a caption and no questions."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "PNG")
    samples = ({"__key__": f"{i}", "png": buffer.getvalue(), "txt": "a cat"} for i in range(8))
    (path,) = write_shards(samples, tmp_path / "plain", 8)
    return f"{{name: shards, urls: {path}}}"


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
