"""`system.pretrained`: a bridge starts from a run, a folder, LAVIS, transformers or BERT."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from blip2_weights import CNN, TUNED
from finished_runs import model_of
from latentmodal.bridges import LinearProjectionConfig
from latentmodal.encoders import TimmImageConfig
from latentmodal.encoders.convert import resize_positions
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.generation import GenerationConfig
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.systems.pretrained import PretrainedConfig
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.experiments.weights import convert_run
from latentmodal.llm import CausalConfig
from one_line import one_line

State = dict[str, Tensor]
Train = Callable[..., Path]
Sources = Callable[..., Path]

NAMES = {"run": "run", "latentmodal": "latentmodal", "lavis": "lavis", "hf": "hf_blip2"}


@pytest.fixture
def source(aligned: Train, tmp_path: Path) -> Sources:
    """`(form, *overrides)` -> what a run, trained with the overrides, is in that format."""

    def make(form: str, *overrides: str) -> Path:
        run = aligned(*overrides)
        if form == "run":
            return run
        target = tmp_path / f"{form}{'.pth' if form == 'lavis' else ''}"
        convert_run(run, target, NAMES[form], Options())
        return target

    return make


def build(tiny_recipes: Path, tmp_path: Path, *overrides: str) -> Any:
    recipe = load_recipe(str(tiny_recipes / "alignment.yaml"), [*overrides, "seed=5"])
    return build_system(recipe, RunFolder(tmp_path / "started")).model


def second_stage(pretrained: PretrainedConfig | None, **image: Any) -> VisionLanguageModel:
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    tower: dict[str, Any] = {
        "image_size": 32,
        "features": "penultimate",
        "model_kwargs": kwargs,
    } | image
    llm = {
        "model_type": "opt", "vocab_size": 40, "hidden_size": 20, "num_hidden_layers": 1,
        "ffn_dim": 8, "num_attention_heads": 2, "word_embed_proj_dim": 20,
    }  # fmt: skip
    return GenerationConfig(
        image_encoder=TimmImageConfig(model="eva_giant_patch14_clip_224", **tower),
        bridge=BRIDGE_CHOICES["qformer"](
            num_queries=3, width=16, layers=3, heads=2, mlp_dim=24, max_positions=12
        ),
        llm=CausalConfig(config=llm),
        pretrained=pretrained,
    ).build_model()


def assert_holds(found: State, expected: State, but: tuple[str, ...] = ()) -> None:
    for name, tensor in found.items():
        if not name.startswith(but):
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("form", ["run", "latentmodal", "lavis", "hf"])
def test_a_first_stage_starts_another(
    form: str, source: Sources, aligned: Train, tiny_recipes: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pretrained = f"system.pretrained={{path: {source(form)}, format: {form}}}"
    started, trained = build(tiny_recipes, tmp_path, pretrained), model_of(aligned())
    # transformers has no caption head and no temperature.
    new = ("caption_head.", "temperature") if form == "hf" else ()
    for part in ("bridge", "head"):
        found, expected = getattr(started, part), getattr(trained, part)
        assert_holds(found.state_dict(), expected.state_dict(), new)
    assert ("has nothing for bridge.caption_head; head.temp" in caplog.text) == (form == "hf")


@pytest.mark.parametrize("form", ["run", "latentmodal", "lavis", "hf"])
def test_a_first_stage_starts_a_second(
    form: str, source: Sources, aligned: Train, tiny_recipes: Path
) -> None:
    pretrained = PretrainedConfig(path=str(source(form)), format=form)
    started = second_stage(pretrained, weights=str(tiny_recipes / "eva.safetensors"))
    expected = model_of(aligned()).bridge.state_dict()
    assert_holds(started.bridge.state_dict(), expected, ("proj.",))
    assert started.bridge.state_dict()["proj.weight"].shape == (20, 16)


@pytest.mark.parametrize("form", ["run", "latentmodal", "lavis", "hf"])
def test_a_tuned_tower_comes_along(form: str, source: Sources, aligned: Train) -> None:
    path = source(form, TUNED)
    expected = model_of(aligned(TUNED)).image_encoder.state_dict()
    same = second_stage(PretrainedConfig(path=str(path), format=form))
    assert_holds(same.image_encoder.state_dict(), expected)
    larger = second_stage(PretrainedConfig(path=str(path), format=form), image_size=48)
    found = larger.image_encoder.state_dict()
    assert_holds(found, expected, ("trunk.pos_embed",))
    positions = resize_positions(expected["trunk.pos_embed"], (6, 6))
    assert torch.equal(found["trunk.pos_embed"], positions)


def test_bert_starts_a_first_stage(tiny_recipes: Path, tmp_path: Path, aligned: Train) -> None:
    aligned()
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        vocab_size=20, max_position_embeddings=12,
    )  # fmt: skip
    bert = BertForMaskedLM(config)
    bert.save_pretrained(tmp_path / "bert")
    pretrained = f"system.pretrained={{path: {tmp_path / 'bert'}, format: bert}}"
    bridge = build(tiny_recipes, tmp_path, pretrained).bridge
    words = bert.bert.embeddings.word_embeddings.weight
    assert torch.equal(bridge.word_embed.weight[:20], words)
    first = bert.bert.encoder.layer[1].intermediate.dense.weight
    for mlp in (bridge.layers[1].text_mlp, bridge.layers[1].query_mlp):
        assert torch.equal(mlp.up.weight, first)


def refusal(step: Callable[[], Any]) -> str:
    message = one_line(step)
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    ("form", "overrides", "reason"),
    [
        ("lavis", ("system.bridge.layers=2",), "Qformer.bert.encoder.layer.2.attention"),
        ("run", ("system.bridge.layers=2",), "the recipe has no bridge.feature_kv.1.key.weight"),
        ("latentmodal", ("system.bridge.num_queries=4",), "bridge.queries is (1, 3, 16), the rec"),
        ("run", ("system.bridge.heads=4",), "bridge.heads is 2 there and 4 in the recipe"),
        ("latentmodal", ("system.bridge.heads=4",), "bridge.heads is 2 there and 4 in the recipe"),
        ("hf", ("system.bridge.heads=4",), "bridge.heads is 2 there and 4 in the recipe"),
        ("hf", ("system.bridge.mlp_dim=32",), "expected (32, 16)"),
    ],
)
def test_what_does_not_fit(
    form: str, overrides: tuple[str, ...], reason: str, source: Sources, tiny_recipes: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = source(form)
    pretrained = f"system.pretrained={{path: {path}, format: {form}}}"
    message = refusal(lambda: build(tiny_recipes, tmp_path, pretrained, *overrides))
    assert reason in message and str(path) in message


def test_an_eva_tower_needs_an_eva(source: Sources, tiny_recipes: Path, tmp_path: Path) -> None:
    pretrained = f"system.pretrained={{path: {source('lavis', TUNED)}, format: lavis}}"
    message = refusal(lambda: build(tiny_recipes, tmp_path, pretrained, CNN, TUNED))
    assert "holds an EVA tower" in message and "image_encoder is a ResNet: name timm's" in message


def test_another_tower_than_eva(source: Sources, tmp_path: Path) -> None:
    state = torch.load(source("lavis"), weights_only=True)["model"]
    state["visual_encoder.class_embedding"] = torch.zeros(32)
    torch.save({"model": state}, tmp_path / "clip_l.pth")
    pretrained = PretrainedConfig(path=str(tmp_path / "clip_l.pth"), format="lavis")
    message = refusal(lambda: second_stage(pretrained))
    assert "its image tower is no EVA (visual_encoder.class_embedding)" in message


def test_nothing_there_or_nothing_safe(aligned: Train, trained: Train, tmp_path: Path) -> None:
    def start(path: Path, form: str) -> str:
        pretrained = PretrainedConfig(path=str(path), format=form)
        return refusal(lambda: second_stage(pretrained))

    for form in ("latentmodal", "lavis", "hf", "bert"):
        assert str(tmp_path / "nowhere") in start(tmp_path / "nowhere", form)
    assert "no run here" in start(tmp_path / "nowhere", "run")
    assert "is a run without a bridge" in start(trained("clip"), "run")
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "bad.pth")
    assert "it would run argparse.Namespace" in start(tmp_path / "bad.pth", "lavis")
    convert_run(aligned(), tmp_path / "ours", "latentmodal")
    config = tmp_path / "ours" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 9}))
    assert "format_version 9.0.0 is newer than 1" in start(tmp_path / "ours", "latentmodal")


def test_only_a_qformer_reads_foreign_files(source: Sources) -> None:
    model = second_stage(None)
    config = LinearProjectionConfig(in_dim=32, out_dim=20, num_input_tokens=17)
    model.bridge = config.build()
    pretrained = PretrainedConfig(path=str(source("lavis")), format="lavis")
    assert "format lavis fills a qformer" in refusal(lambda: pretrained.load_into(model))
