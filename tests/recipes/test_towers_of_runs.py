"""A run's image tower in another run: the very one it was trained on, or a refusal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip2_weights import TUNED
from finished_runs import model_of
from latentmodal.encoders import TimmImageConfig
from latentmodal.experiments.exports.blip2 import Options
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.parts import RunImageConfig
from latentmodal.experiments.training.checkpoints import VerifiedCheckpointIO, read_checkpoint
from latentmodal.experiments.training.fingerprints import tower_digests, unlike
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.experiments.weights import convert_run
from one_line import one_line

Train = Callable[..., Path]

PARTLY = 'freeze={"image_encoder.trunk.blocks.0.*": frozen}'
RANDOM = "system.image_encoder.weights=null"


def tower_of(run: Path) -> dict[str, Tensor]:
    """As evaluation has it."""
    state: dict[str, Tensor] = model_of(run).image_encoder.state_dict()
    return state


def assert_same(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def lavis(aligned: Train, tmp_path: Path) -> str:
    """A recipe's keys: a frozen tower that comes with a file of the whole model."""
    convert_run(aligned(TUNED), tmp_path / "tuned.pth", "lavis", Options())
    return f"system.pretrained={{path: {tmp_path / 'tuned.pth'}, format: lavis}}"


def forget(run: Path, target: Path) -> Path:
    """The run as it was left before checkpoints noted their towers."""
    copy = RunFolder(shutil.copytree(run, target))
    content = read_checkpoint(copy.checkpoint())
    del content["frozen_tower"]
    VerifiedCheckpointIO().save_checkpoint(content, copy.checkpoint())
    return target


@pytest.mark.parametrize("noted", [True, False])
def test_a_frozen_tower_that_came_with_a_whole_model(
    aligned: Train, lavis: str, tmp_path: Path, noted: bool
) -> None:
    run = aligned(RANDOM, lavis)
    expected = tower_of(run)
    if not noted:
        run = forget(run, tmp_path / "old")
    assert_same(RunImageConfig(path=str(run)).build(), expected)
    tuned = RunImageConfig(path=str(aligned(TUNED))).build()
    assert_same(tuned, expected)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("plan", [TUNED, PARTLY])
def test_a_tower_that_trained_wholly_or_in_part(
    aligned: Train, tmp_path: Path, plan: str, noted: bool
) -> None:
    run = aligned(plan)
    expected = tower_of(run)
    if not noted:
        run = forget(run, tmp_path / "old")
    encoder = RunImageConfig(path=str(run)).build()
    assert_same(encoder, expected)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("noted", [True, False])
def test_a_random_tower_that_was_frozen_cannot_come_again(
    aligned: Train, tmp_path: Path, noted: bool
) -> None:
    run = aligned(RANDOM)
    if not noted:
        run = forget(run, tmp_path / "old")
    message = one_line(RunImageConfig(path=str(run)).build)
    assert message.startswith(f"system.image_encoder.path: the frozen weights of {run} are not")


def build(tiny_recipes: Path, tmp_path: Path, *overrides: str) -> Any:
    recipe = load_recipe(str(tiny_recipes / "alignment.yaml"), [*overrides, "seed=5"])
    return build_system(recipe, RunFolder(tmp_path / "started")).model


@pytest.mark.parametrize("plan", ["seed=0", PARTLY])
def test_a_bridge_goes_on_over_its_own_tower_only(
    aligned: Train, tiny_recipes: Path, tmp_path: Path, plan: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = aligned(plan)
    start = f"system.pretrained={{path: {run}, format: run}}"
    assert_same(build(tiny_recipes, tmp_path, start).image_encoder, tower_of(run))
    larger = build(tiny_recipes, tmp_path, start, "system.image_encoder.image_size=48")
    assert larger.image_encoder.num_tokens == 37, "positions of another size are no other tower"
    message = one_line(lambda: build(tiny_recipes, tmp_path, start, RANDOM))
    assert f"{run} was trained on another image tower than the recipe's (trunk." in message
    old = forget(run, tmp_path / "old")
    start = f"system.pretrained={{path: {old}, format: run}}"
    if plan != PARTLY:
        build(tiny_recipes, tmp_path, start, RANDOM)
        assert f"{old} does not say what tower it read" in caplog.text


def test_kwargs_are_for_towers_that_take_them(trained: Train) -> None:
    kwargs = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **kwargs}
    fields = ", ".join(f"{name}: {value}" for name, value in config.items())
    run = trained("clip", f"system.image_encoder={{name: transformers, config: {{{fields}}}}}")
    assert RunImageConfig(path=str(run)).build().width == 32
    message = one_line(RunImageConfig(path=str(run), model_kwargs={"depth": 1}).build)
    assert message.startswith("system.image_encoder.model_kwargs: the tower of ")


def test_the_home_folder_is_written_out(
    aligned: Train, tiny_recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = aligned()
    monkeypatch.setenv("HOME", str(run.parent))
    away = f"~/{run.name}"
    assert_same(RunImageConfig(path=away).build(), tower_of(run))
    build(tiny_recipes, tmp_path, f"system.pretrained={{path: {away}, format: run}}")
    monkeypatch.setenv("HOME", str(tiny_recipes))
    home = ["system.image_encoder.weights=~/eva.safetensors"]
    build(tiny_recipes, tmp_path, *home, "system.tokenizer.model=~/tokenizer-led")


def test_positions_of_a_tower_are_no_reason_to_take_another(tiny_recipes: Path) -> None:
    """Only their shape may differ: the same shape with other values is another tower."""

    def tower(size: int) -> nn.Module:
        torch.manual_seed(0)
        kwargs = {"patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
        return TimmImageConfig(
            model="vit_tiny_patch16_224", image_size=size, model_kwargs=kwargs
        ).build()

    model = nn.Module()
    model.image_encoder = tower(32).requires_grad_(False)
    digests = tower_digests(model)
    assert unlike(tower(32), digests) == []
    other = tower(32)
    other.get_parameter("trunk.pos_embed").data[0, 0, 0] += 1
    assert unlike(other, digests) == ["trunk.pos_embed"]
    larger = tower(48)
    larger.load_state_dict(
        {k: v for k, v in tower(32).state_dict().items() if "pos" not in k}, strict=False
    )
    assert unlike(larger, digests) == []
