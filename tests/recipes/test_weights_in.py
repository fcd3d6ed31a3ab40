"""`system.weights`: a recipe starts from another library's towers, or says why it cannot."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import CLIPConfig, CLIPModel

from bomb import Bomb
from finished_runs import model_of
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.fit import build_system, fit
from latentmodal.experiments.training.run_folder import RunFolder
from latentmodal.experiments.weights import convert_run
from one_line import one_line

IDS_BT = torch.tensor([[4, 19, 0, 0, 0, 0, 0, 0], [5, 6, 7, 19, 0, 0, 0, 0]])
PIXELS_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def hf_clip(folder: Path) -> CLIPModel:
    """A CLIP of the shape of the tiny recipe, saved as the hub lays it out."""
    torch.manual_seed(1)
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        text_config={
            **common,
            "hidden_size": 16,
            "intermediate_size": 64,
            "vocab_size": 20,
            "max_position_embeddings": 8,
            "eos_token_id": 19,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            **common,
            "hidden_size": 32,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=24,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def open_clip_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    state: dict[str, torch.Tensor] = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
        quick_gelu=True,
    ).state_dict()
    return state


def build(tiny_recipes: Path, tmp_path: Path, *overrides: str) -> Any:
    recipe = load_recipe(str(tiny_recipes / "clip.yaml"), overrides)
    return build_system(recipe, RunFolder(tmp_path / "run")).model.eval()


def refusal(tiny_recipes: Path, tmp_path: Path, *overrides: str) -> str:
    return one_line(lambda: build(tiny_recipes, tmp_path, *overrides))


@torch.no_grad()
def test_transformers_folder_gives_its_embeddings(tiny_recipes: Path, tmp_path: Path) -> None:
    theirs = hf_clip(tmp_path / "hf")
    weights = f"system.weights={{path: {tmp_path / 'hf'}, format: hf_clip}}"
    ours = build(tiny_recipes, tmp_path, weights)
    pixels = ours.image_encoder.normalise(PIXELS_BCHW)
    for mine, other in (
        (ours.encode_image(PIXELS_BCHW), theirs.get_image_features(pixels).pooler_output),
        (ours.encode_text(IDS_BT, IDS_BT != 0), theirs.get_text_features(IDS_BT).pooler_output),
    ):
        torch.testing.assert_close(mine, F.normalize(other, dim=-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.head.logit_scale, theirs.logit_scale.reshape(1))


def test_wrong_activation_is_refused(tiny_recipes: Path, tmp_path: Path) -> None:
    hf_clip(tmp_path / "hf")
    message = refusal(
        tiny_recipes,
        tmp_path,
        f"system.weights={{path: {tmp_path / 'hf'}, format: hf_clip}}",
        "system.text_encoder.activation=gelu",
    )
    assert message == (
        f"{tmp_path / 'run' / 'recipe.yaml'}: {tmp_path / 'hf'} was trained with "
        "activation='quick_gelu' in its text tower, ours has 'gelu'; "
        "set the text encoder's activation to 'quick_gelu'."
    )


def test_wrong_activation_on_the_command_line(
    tiny_recipes: Path, tmp_path: Path, latentmodal: Any
) -> None:
    hf_clip(tmp_path / "hf")
    keys = [
        f"system.weights={{path: {tmp_path / 'hf'}, format: hf_clip}}",
        f"run_dir={tmp_path / 'run'}",
    ]
    done = latentmodal(
        "fit", tiny_recipes / "clip.yaml", "system.image_encoder.activation=gelu", *keys
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "ours has 'gelu'" in last
    assert "Traceback" not in done.stderr
    # The mistake mended, the same folder is good: nothing had been trained in it.
    recipe = load_recipe(str(tiny_recipes / "clip.yaml"), keys)
    fit(recipe, resume=False, console=Console(file=io.StringIO()))
    assert RunFolder(tmp_path / "run").finished_file.exists()


def test_bare_file_needs_the_activation_stated(tiny_recipes: Path, tmp_path: Path) -> None:
    file = tmp_path / "epoch_32.pt"
    torch.save({"epoch": 32, "state_dict": open_clip_state()}, file)
    weights = f"path: {file}, format: open_clip"
    message = refusal(tiny_recipes, tmp_path, f"system.weights={{{weights}}}")
    assert "does not say which activation it was trained with" in message
    assert "system.weights.activation" in message
    message = refusal(tiny_recipes, tmp_path, f"system.weights={{{weights}, activation: gelu}}")
    assert "ours has 'quick_gelu'" in message
    model = build(tiny_recipes, tmp_path, f"system.weights={{{weights}, activation: quick_gelu}}")
    assert torch.equal(
        model.text_encoder.token_embed.weight, open_clip_state()["token_embedding.weight"]
    )


def test_openai_format_states_it_by_name(tiny_recipes: Path, tmp_path: Path) -> None:
    torch.save(open_clip_state(), tmp_path / "ViT-tiny.pt")
    weights = f"system.weights={{path: {tmp_path / 'ViT-tiny.pt'}, format: openai}}"
    assert build(tiny_recipes, tmp_path, weights) is not None
    message = refusal(tiny_recipes, tmp_path, weights, "system.text_encoder.activation=gelu")
    assert "trained with activation='quick_gelu' in its text tower" in message


@pytest.mark.parametrize("content", ["namespace", "bomb"])
def test_pickled_objects_are_refused(tiny_recipes: Path, tmp_path: Path, content: str) -> None:
    file, mark = tmp_path / "bad.pt", tmp_path / "executed"
    thing = argparse.Namespace(lr=1) if content == "namespace" else Bomb(mark)
    torch.save({"state_dict": open_clip_state(), "args": thing}, file)
    weights = f"system.weights={{path: {file}, format: openai}}"
    assert f"{file} is refused" in refusal(tiny_recipes, tmp_path, weights)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("system.weights={path: nowhere, format: hf_clip}", "nowhere holds no weights"),
        ("system.weights={path: PATH, format: hf}", "choose from openai, open_clip, hf_clip"),
        ("system.weights={path: PATH, format: hf_siglip}", "trained with activation="),
        ("system.text_encoder.depth=1", "does not fit the recipe's towers"),
        ("system.text_encoder.width=32", "size mismatch for text_encoder.pos_embed"),
    ],
)
def test_what_does_not_fit(tiny_recipes: Path, tmp_path: Path, change: str, reason: str) -> None:
    hf_clip(tmp_path / "hf")
    if "hf_siglip" in change:  # a checkpoint of the other kind: its default activation differs
        config = tmp_path / "hf" / "config.json"
        content = json.loads(config.read_text())
        for tower in ("vision_config", "text_config"):
            content[tower].pop("hidden_act", None)
        config.write_text(json.dumps(content))
    weights = f"system.weights={{path: {tmp_path / 'hf'}, format: hf_clip}}"
    change = change.replace("PATH", str(tmp_path / "hf"))
    assert reason in refusal(tiny_recipes, tmp_path, weights, change)


def test_our_own_file_starts_another_run(
    tiny_recipes: Path, tmp_path: Path, trained: Callable[..., Path]
) -> None:
    run = trained("clip")
    convert_run(run, tmp_path / "ours", "latentmodal")
    weights = f"system.weights={{path: {tmp_path / 'ours'}, format: latentmodal}}"
    started = build(tiny_recipes, tmp_path, weights, "seed=5").state_dict()
    for name, tensor in model_of(run).state_dict().items():
        assert torch.equal(started[name], tensor), name


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("system.text_encoder.eot_id=7", "text_encoder.eot_id is 7 but the tokenizer ends texts"),
        ("system.tokenizer.context_length=9", "tokenizer.context_length is 9 but the text tower"),
        (
            "system.text_encoder={vocab_size: 19, eot_id: 18}",
            "text_encoder.vocab_size is 19 but the tokenizer has 20 tokens",
        ),
    ],
)
def test_tokenizer_and_tower_must_agree(
    tiny_recipes: Path, tmp_path: Path, override: str, reason: str
) -> None:
    assert reason in refusal(tiny_recipes, tmp_path, override)
