"""MiniGPT-4 from end to end on tiny scenes: a first stage, curated descriptions, a second stage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byte_llama import save_byte_llama
from command_line import main
from finished_runs import Chain, checkpoint, sections, system_of
from latentmodal.experiments.curation.ledger import Ledger, Reviewed
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.systems.generation import GenerationSystem
from latentmodal.llm import GenerationSettings, Turn

STAGE_1 = """
base: minigpt4/stage1_emoji
name: tiny-stage1
run_dir: RUNS/stage1
system:
  image_encoder: {path: RUNS/clip}
  bridge: {factor: 3}
  llm: {name: causal, gguf: null, model: RUNS/llm}
  generation: {max_new_tokens: 6}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {max_steps: 6, log_every: 1, checkpoint_every: 2}
evaluation:
  at_start: false
  tasks:
    unseen_pairs: {source: {preset: tiny}, baseline: {preset: tiny}}
"""

STAGE_2 = """
base: minigpt4/stage2_emoji
name: tiny-stage2
run_dir: RUNS/stage2
system:
  image_encoder: {path: RUNS/clip}
  bridge: {factor: 3}
  llm: {name: causal, gguf: null, model: RUNS/llm}
  projection: {path: RUNS/stage1}
  generation: {max_new_tokens: 6}
data:
  train: [{name: shards, urls: RUNS/curated}]
  loader: {batch_size: 4, workers: 0, shuffle_window: 4}
trainer: {max_steps: 3, log_every: 1, checkpoint_every: 3, eval_every: 3}
evaluation:
  tasks:
    descriptions: {source: {preset: tiny}}
    presence: {source: {preset: tiny}}
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, emoji_cache: Path, tiny_clip: str) -> Chain:
    made = Chain(tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("runs"))
    save_byte_llama(made.run("llm"))
    texts = {"clip": f"{tiny_clip}run_dir: RUNS/clip\n", "stage1": STAGE_1, "stage2": STAGE_2}
    made.write(texts)
    clip = ["evaluation.tasks=null", "trainer.max_steps=2"]
    assert main("fit", made.recipe("clip"), *clip) == 0
    assert main("fit", made.recipe("stage1")) == 0
    curate(made)
    assert main("fit", made.recipe("stage2")) == 0
    return made


def curate(chain: Chain) -> None:
    """Descriptions of eight pictures by the first stage, all kept, as shards."""
    ledger = chain.run("ledger")
    source = ("--source", "emoji:train:tiny:0", "--limit", 8, "--style", "run")
    generated = ("--min-tokens", 0, "--max-new-tokens", 6, "--out", ledger)
    assert main("curate", "generate", chain.run("stage1"), *source, *generated) == 0
    with Ledger(ledger / "ledger.jsonl") as opened:
        for record in list(opened.records().values()):
            edit = Reviewed(id=record.id, by="test", decision="edit", text="A thing on a picture.")
            opened.append(edit)
    assert main("curate", "export", ledger, "--to", "shards", "--out", chain.run("curated")) == 0


def test_a_checkpoint_holds_the_projection_alone(chain: Chain) -> None:
    saved = checkpoint(chain.run("stage1"))["state_dict"]
    weights = {name for name in saved if not name.startswith("model.image_encoder.")}
    assert weights == {"model.bridge.proj.0.weight", "model.bridge.proj.0.bias"}


def test_stage_2_goes_on_from_the_projection_of_stage_1(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def look(self: System, *arguments: Any) -> None:
        seen.append(self.model.bridge.state_dict()["proj.0.weight"].clone())
        raise RuntimeError("seen")

    monkeypatch.setattr(System, "check_finite", look)
    keys = (f"run_dir={tmp_path}", "evaluation.tasks=null")
    with pytest.raises(RuntimeError, match="seen"):
        main("fit", chain.recipe("stage2"), *keys)
    saved = checkpoint(chain.run("stage1"))["state_dict"]
    assert torch.equal(seen[0], saved["model.bridge.proj.0.weight"])


def test_stage_2_is_measured_before_and_after(chain: Chain) -> None:
    run = chain.run("stage2")
    for file in (run / "evaluations/step=00000000.json", run / "eval.json"):
        found = sections(file)
        assert {"descriptions", "presence"} <= set(found)
        assert {"words", "repeats", "object_recall", "CHAIRi"} <= set(found["descriptions"])


def test_a_conversation_streams_what_it_would_say(chain: Chain) -> None:
    system = system_of(chain.run("stage2"))
    assert isinstance(system, GenerationSystem)
    generator = torch.Generator().manual_seed(0)
    side = system.model.image_encoder.preprocess.size
    pixels_KCHW = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    turns = [
        Turn("user", "<image> and <image>"),
        Turn("assistant", "A cat."),
        Turn("user", "Which is larger?"),
    ]
    settings = GenerationSettings(num_beams=1, max_new_tokens=12)
    (said,) = system.converse(pixels_KCHW, [turns], settings)
    assert "".join(system.stream(pixels_KCHW, turns, settings)) == said
    without = system.converse(pixels_KCHW[:0], [[Turn("user", "Hello")]], settings)
    assert len(without) == 1
    with pytest.raises(ValueError, match="speak of 2 pictures, 1 are given"):
        system.converse(pixels_KCHW[:1], [turns], settings)


def conversations(folder: Path) -> None:
    """Two samples about their picture and two that leave it out."""
    samples: list[dict[str, Any]] = []
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (96, 96), (number * 40, 80, 120)).save(file, "png")
        place = "<image> " if number < 2 else ""
        turns = [
            {"role": "user", "text": f"{place}What is it?"},
            {"role": "assistant", "text": "A colour."},
            {"role": "user", "text": "Which?"},
            {"role": "assistant", "text": "Blue."},
        ]
        samples.append(
            {"__key__": str(number), "png": file.getvalue(), "json": {"conversation": turns}}
        )
    write_shards(samples, folder)


@pytest.mark.parametrize("style", ["vicuna_v0", "vicuna_v1", "llama2_chat"])
def test_conversations_train_also_without_their_pictures(
    chain: Chain, tmp_path: Path, style: str
) -> None:
    conversations(tmp_path / "shards")
    keys = (
        f"run_dir={tmp_path}/run",
        "system.target=conversation",
        f"system.conversation.style={style}",
        f"data.train=[{{name: shards, urls: {tmp_path}/shards}}]",
        "data.loader.batch_size=2",  # some batches have no picture at all
        "evaluation.tasks=null",
        "trainer.max_steps=4",
    )
    assert main("fit", chain.recipe("stage2"), *keys) == 0


def test_all_questions_of_a_picture_are_learned_at_once(chain: Chain) -> None:
    """With LoRA in the language model, and judged beside what is answered without a look."""
    run = chain.run("answers")
    source = "name: emoji, preset: tiny"
    keys = (
        f"run_dir={run}",
        "system.target=answers",
        "system.llm.lora={rank: 2}",
        'freeze={"*lora_*": 1.0, "image_encoder.*": frozen, "llm.*": frozen}',
        f"data.train=[{{{source}}}]",
        f"evaluation.tasks={{asked: {{name: vqa, scoring: exact, baseline: {{{source}}}, "
        f"source: {{{source}, split: unseen_pairs}}}}}}",
    )
    assert main("fit", chain.recipe("stage2"), *keys) == 0
    trained = checkpoint(run)["state_dict"]
    loras = {name: value for name, value in trained.items() if "lora_B" in name}
    assert loras and all(value.any() for value in loras.values()), "they begin at zero"
    asked = sections(run / "eval.json")["asked"]
    assert {"exact_match", "exact_match/presence", "exact_match/colour"} <= set(asked)
    assert 0 < asked["exact_match"]["chance"] < 1
    assert "most frequent training answer" in asked["exact_match"]["protocol"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["system.target=answers", "system.conversation.style=plain"],
            "leaves out what the user says; choose another style",
        ),
        (["system.target=conversation"], "has no conversation in its json"),
        (["system.conversation=null", "system.target=conversation"], "needs system.conversation"),
        (["system.conversation.style=vicuna"], "is unknown; choose from plain"),
        (["system.projection.path=nowhere"], "nowhere"),
        (["system.bridge.factor=2"], "does not divide the grid of 3 x 3"),
    ],
)
def test_a_mistake_is_one_line(
    chain: Chain,
    keys: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert main("fit", chain.recipe("stage2"), f"run_dir={tmp_path}/run", *keys) == 2
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]
    assert "Traceback" not in printed
