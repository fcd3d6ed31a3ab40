"""The recipes of MiniGPT-4 and LLaVA: what trains of them, in what they differ, what papers say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentmodal.experiments.recipe import load_recipe, shipped_recipes
from meta_models import built

MINIGPT4 = [name for name in shipped_recipes() if name.startswith("minigpt4/")]

# What trains is the projection alone; parameters as released.
TRAINABLE = {
    "minigpt4/stage1_vicuna7b": 768 * 4096 + 4096,
    "minigpt4/stage2_vicuna7b": 768 * 4096 + 4096,
    "minigpt4/stage1_vicuna13b": 768 * 5120 + 5120,
    "minigpt4/stage2_vicuna13b": 768 * 5120 + 5120,
    "minigpt4/llama2": 4 * 1408 * 4096 + 4096,
    "minigpt4/stage2_llama2": 4 * 1408 * 4096 + 4096,
    "minigpt4/llava_mlp": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    "minigpt4/stage1_emoji": 4 * 256 * 576 + 576,
    "minigpt4/stage2_emoji": 4 * 256 * 576 + 576,
    "minigpt4/stage1_emoji_pairs": 4 * 256 * 576 + 576,
    "minigpt4/stage2_emoji_pairs": 4 * 256 * 576 + 576,
    "minigpt4/answers_emoji_pairs": 4 * 256 * 576 + 576,
}
# In every layer two matrices at the queries (576) and two at the values (192 wide).
LORA = {"minigpt4/answers_emoji_pairs": 30 * 16 * (576 + 576 + 576 + 192)}
TOKENS = {
    "minigpt4/stage1_vicuna7b": 32,
    "minigpt4/llama2": 64,
    "minigpt4/llava_mlp": 576,
    "minigpt4/stage1_emoji": 9,
}
MERGE = {
    "system.bridge.name": "token_merge",
    "system.bridge.merge": 4,
    "system.bridge.skip_tokens": 1,
    "system.bridge.input_norm": True,
    "system.bridge.parts": "absent",
    "system.llm.model": "meta-llama/Llama-2-7b-chat-hf",
    "system.pretrained": None,
    "system.pretrained.path": "absent",
    "system.pretrained.format": "absent",
    "freeze.bridge.input_norm.*": "frozen",
    "freeze.bridge.parts.0.*": "absent",
}


def test_every_recipe_is_counted() -> None:
    assert set(MINIGPT4) == TRAINABLE.keys()


@pytest.mark.parametrize("name", MINIGPT4)
def test_only_the_projection_trains_and_what_lora_adds(name: str) -> None:
    model = built(name)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    added = [trainable.pop(n) for n in list(trainable) if "lora_" in n]
    assert sum(p.numel() for p in added) == LORA.get(name, 0)
    assert sum(p.numel() for p in trainable.values()) == TRAINABLE[name]
    last = "bridge.parts.1." if "vicuna" in name else "bridge."
    assert all(n.startswith(last) for n in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}


@pytest.mark.parametrize("name", TOKENS)
def test_soft_tokens_of_a_picture(name: str) -> None:
    assert built(name).bridge.num_output_tokens == TOKENS[name]


@pytest.mark.parametrize(
    ("name", "lr", "min_lr", "start", "warmup", "batch", "steps"),
    [
        # The released train_configs; of the second stage the paper's 400 steps.
        ("minigpt4/stage1_vicuna7b", 1e-4, 8e-5, 1e-6, 5000, 256, 20_000),
        ("minigpt4/stage1_vicuna13b", 1e-4, 8e-5, 1e-6, 5000, 256, 20_000),
        ("minigpt4/llama2", 1e-4, 8e-5, 1e-6, 5000, 256, 20_000),
        ("minigpt4/stage2_vicuna7b", 3e-5, 1e-5, 1e-6, 200, 12, 400),
        ("minigpt4/stage2_vicuna13b", 3e-5, 1e-5, 1e-6, 200, 12, 400),
        ("minigpt4/stage2_llama2", 3e-5, 1e-5, 1e-6, 200, 12, 400),
    ],
)
def test_published_settings(
    name: str, lr: float, min_lr: float, start: float, warmup: int, batch: int, steps: int
) -> None:
    recipe = load_recipe(name)
    optim, trainer = recipe.optim, recipe.trainer
    assert (optim.lr, optim.min_lr, optim.warmup_start_lr) == (lr, min_lr, start)
    assert optim.warmup_steps == warmup
    assert (optim.betas, optim.weight_decay, optim.grad_clip) == ((0.9, 0.999), 0.05, None)
    assert recipe.data.loader.batch_size * trainer.world_size == batch
    assert trainer.max_steps == steps


def test_llava_sees_each_caption_once() -> None:
    recipe = load_recipe("minigpt4/llava_mlp")
    batch = recipe.data.loader.batch_size * recipe.trainer.world_size
    assert batch == 256
    assert recipe.trainer.max_steps == 558_128 // batch
    assert recipe.optim.warmup_steps == -(-3 * recipe.trainer.max_steps // 100)


def test_the_first_stage_mixes_its_sets_as_published() -> None:
    weights = [source.weight for source in load_recipe("minigpt4/stage1_vicuna7b").data.train]
    assert weights == [115, 14]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("minigpt4/stage1_vicuna13b", {"system.llm.model": "weights/vicuna-13b-v0"}),
        ("minigpt4/llama2", MERGE),
    ],
)
def test_differs_from_its_base_in_these_keys_only(
    name: str, differs: dict[str, Any], changes: Callable[[str], dict[str, Any]]
) -> None:
    assert changes(name) == differs


@pytest.mark.parametrize("stage", ["stage1_emoji", "stage2_emoji"])
def test_eight_things_change_data_and_length_alone(
    stage: str, changes: Callable[[str], dict[str, Any]]
) -> None:
    changed = changes(f"minigpt4/{stage}_pairs")
    others = {key for key in changed if not key.startswith(("data.", "trainer.", "evaluation."))}
    assert others == ({"system.projection.path"} if stage == "stage2_emoji" else set())
    sources = {key: value for key, value in changed.items() if key.startswith("evaluation.")}
    assert set(sources.values()) == {"pairs", "arrangements"}


@pytest.mark.parametrize(
    ("stage", "style", "target"),
    [
        ("stage1_vicuna7b", "plain", "caption"),
        ("stage2_vicuna7b", "vicuna_v0", "description"),
        ("stage2_llama2", "llama2_chat", "description"),
    ],
)
def test_how_each_stage_speaks(stage: str, style: str, target: str) -> None:
    system = load_recipe(f"minigpt4/{stage}").system
    assert (system.conversation.style, system.target) == (style, target)
