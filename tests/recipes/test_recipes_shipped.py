"""Every shipped recipe loads and comes back from YAML; CLIP and its kin build on the meta device
and say what the papers say. The recipes of BLIP-2 have a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentmodal.encoders import WordTokenizerConfig, train_word_tokenizer
from latentmodal.experiments.recipe import load_recipe, shipped_recipes, to_yaml
from latentmodal.experiments.training.freeze import FreezePlan, freeze_rows
from meta_models import build_on_meta

SHIPPED = shipped_recipes()
CONTRASTIVE = [name for name in SHIPPED if name.startswith("clip/")]
LANGUAGE_MODELS = [name for name in SHIPPED if name.startswith("lm/")]

PARAMETERS = {
    "clip/vit_b32": 151_277_313,
    "clip/vit_l14": 427_616_513,
    "clip/siglip_b16": 203_155_970,
}

# Everything in which a recipe differs from its base, name and description aside.
DIFFERS: dict[str, dict[str, Any]] = {
    "clip/vit_l14": {
        "system.image_encoder.model": "vit_large_patch14_clip_224.openai",
        "system.text_encoder.width": 768,
        "system.text_encoder.heads": 12,
        "system.tokenizer.model": "openai/clip-vit-large-patch14",
        "system.head.embed_dim": 768,
        "data.loader.batch_size": 256,
        "optim.lr": 4e-4,
        "trainer.nodes": 16,
        "trainer.activation_checkpointing": True,
    },
    "clip/siglip_b16": {
        "system.image_encoder.model": "vit_base_patch16_siglip_224",
        "system.image_encoder.activation": "gelu",
        "system.image_encoder.resize": "squash",
        "system.text_encoder.vocab_size": 32000,
        "system.text_encoder.context_length": 64,
        "system.text_encoder.width": 768,
        "system.text_encoder.heads": 12,
        "system.text_encoder.causal": False,
        "system.text_encoder.pooling": "last",
        "system.text_encoder.activation": "gelu",
        "system.text_encoder.layer_norm_eps": 1e-6,
        "system.text_encoder.pad_id": 1,
        "system.text_encoder.eot_id": 1,
        "system.tokenizer.model": "google/siglip-base-patch16-224",
        "system.tokenizer.context_length": 64,
        "system.tokenizer.trim": False,
        "system.head.embed_dim": 768,
        "system.head.image_projection": "none",
        "system.head.text_bias": True,
        "system.head.init_logit_scale": 2.302585092994046,
        "system.head.init_logit_bias": -10.0,
        "system.loss": "sigmoid",
        "optim.lr": 1e-3,
        "optim.betas": [0.9, 0.95],
        "optim.weight_decay": 1e-4,
    },
    "clip/lit": {
        "system.image_encoder.model": "vit_base_patch16_224.augreg_in21k",
        "system.image_encoder.pretrained": True,
        "system.image_encoder.activation": None,
        "system.text_encoder.width": 768,
        "system.text_encoder.heads": 12,
        "system.head.embed_dim": 768,
        "system.head.image_projection": "none",
        "system.head.init_logit_scale": 2.302585092994046,
        "freeze.image_encoder.*": "frozen",
        "data.train": [
            {
                "name": "shards",
                "urls": "data/coco_train/*.tar",
                "weight": 1.0,
                "caption": "random",
                "num_samples": None,
            }
        ],
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": 150,
        "optim.grad_clip": 1.0,
        "trainer.max_steps": 5000,
        "trainer.devices": 1,
        "trainer.nodes": 1,
        "trainer.parallelism": "single",
    },
    "clip/emoji_large": {
        "system.image_encoder.model": "vit_small_patch16_224",
        "system.image_encoder.image_size": 224,
        "system.image_encoder.pool": "avg",
        "system.image_encoder.model_kwargs.channels": "absent",
        "system.image_encoder.model_kwargs.stem_width": "absent",
        "system.text_encoder.vocab_size": 4096,
        "system.text_encoder.width": 384,
        "system.text_encoder.depth": 6,
        "system.text_encoder.heads": 6,
        "system.head.embed_dim": 256,
        "data.train": [
            {
                "name": "emoji",
                "preset": "large",
                "seed": 0,
                "split": "train",
                "weight": 1.0,
                "caption": "random",
            }
        ],
        "data.loader.batch_size": 1024,
        "data.loader.workers": 12,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.1,
        "optim.warmup_steps": 500,
        "trainer.max_steps": 20000,
        "trainer.accelerator": "gpu",
        "trainer.precision": "bf16",
        "trainer.compile": True,
        "trainer.eval_every": 2000,
        "trainer.checkpoint_every": 1000,
        "evaluation.tasks.unseen_pairs.source.preset": "large",
        "evaluation.tasks.swapped_captions.source.preset": "large",
        "evaluation.tasks.naming_unseen_style.source.preset": "large",
        "evaluation.tasks.naming_seen_styles.source.preset": "large",
        "evaluation.tasks.naming_unseen_things.source.preset": "large",
    },
    "lm/emoji_names": {
        "system.width": 128,
        "system.layers": 3,
        "system.mlp_dim": 384,
        "optim.lr": 4e-3,
        "trainer.max_steps": 1500,
    },
    "lm/emoji_small": {
        "system.width": 128,
        "system.layers": 2,
        "system.heads": 2,
        "system.mlp_dim": 384,
        "data.train": [
            {
                "name": "emoji",
                "preset": "few",
                "seed": 0,
                "split": "train",
                "weight": 1.0,
                "caption": "random",
            }
        ],
        "optim.lr": 4e-3,
        "optim.warmup_steps": 20,
        "trainer.max_steps": 100,
    },
}


def count(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("name", SHIPPED)
def test_comes_back_from_its_own_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(recipe))
    assert load_recipe(str(resolved)) == recipe
    assert recipe.description, "`latentmodal recipe list` would show an empty line"
    assert recipe.name == name.replace("/", "-")


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_builds_on_the_meta_device(name: str) -> None:
    recipe = load_recipe(name)
    model = build_on_meta(recipe)
    parameters = list(model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    if name in PARAMETERS:
        assert count(parameters) == PARAMETERS[name]

    plan = FreezePlan(recipe.freeze)
    plan.apply(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    if name == "clip/lit":
        assert trainable == [
            n for n, _ in model.named_parameters() if n.startswith(("text_encoder.", "head."))
        ]
        assert not model.image_encoder.training
    else:
        assert len(trainable) == len(parameters)
    total = freeze_rows(model, plan, recipe.optim.lr)[-1]
    assert total.parameters == count(parameters)
    assert total.trainable == count([p for p in parameters if p.requires_grad])


def test_the_small_language_model_on_the_meta_device(tmp_path: Path) -> None:
    train_word_tokenizer(["a cat above a dog", "two red hearts"], tmp_path / "tokenizer.json")
    tokenizer = WordTokenizerConfig(path=str(tmp_path)).build()
    recipe = load_recipe("lm/emoji")
    with torch.device("meta"):
        system = recipe.system.build(
            FreezePlan(recipe.freeze), recipe.optim, recipe.trainer, tokenizer
        )
    parameters = list(system.parameters())
    assert all(parameter.is_meta and parameter.requires_grad for parameter in parameters)
    width, mlp, layers = 256, 768, 4
    per_layer = 4 * width * width + 3 * width * mlp + 2 * width
    # Embeddings and head are one matrix.
    assert count(parameters) == layers * per_layer + (tokenizer.vocab_size + 1) * width


def test_every_recipe_with_a_base_is_in_the_table(base_of: Callable[[str], str | None]) -> None:
    assert {name for name in CONTRASTIVE + LANGUAGE_MODELS if base_of(name)} == DIFFERS.keys()
    families = {name.split("/")[0] for name in SHIPPED if base_of(name)}
    assert families == {"clip", "lm", "blip2", "minigpt4"}, "a new family needs a table of its own"


@pytest.mark.parametrize("name", DIFFERS)
def test_differs_from_its_base_in_these_keys_only(
    name: str, changes: Callable[[str], dict[str, Any]]
) -> None:
    assert changes(name) == DIFFERS[name]


@pytest.mark.parametrize(
    ("name", "lr", "betas", "eps", "weight_decay"),
    [
        # Radford et al. 2021 (arXiv 2103.00020), tables 18 and 19.
        ("clip/vit_b32", 5e-4, (0.9, 0.98), 1e-6, 0.2),
        ("clip/vit_l14", 4e-4, (0.9, 0.98), 1e-6, 0.2),
        # Zhai et al. 2023 (arXiv 2303.15343), from scratch.
        ("clip/siglip_b16", 1e-3, (0.9, 0.95), 1e-6, 1e-4),
    ],
)
def test_published_settings(
    name: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    recipe = load_recipe(name)
    optim, trainer = recipe.optim, recipe.trainer
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (lr, betas, eps, weight_decay)
    assert optim.warmup_steps == 2000
    global_batch = recipe.data.loader.batch_size * trainer.devices * trainer.nodes
    assert global_batch == 32_768
    assert trainer.max_steps == 32 * 400_000_000 // global_batch


def test_temperatures_start_where_the_papers_say() -> None:
    clip, siglip = (load_recipe(f"clip/{name}").system.head for name in ("vit_b32", "siglip_b16"))
    assert clip.init_logit_scale == pytest.approx(2.6593, abs=1e-4)  # ln(1 / 0.07)
    assert clip.max_logit_scale == pytest.approx(4.6052, abs=1e-4)  # ln 100
    assert clip.init_logit_bias is None
    assert siglip.init_logit_scale == pytest.approx(2.3026, abs=1e-4)  # ln 10
    assert siglip.init_logit_bias == -10
