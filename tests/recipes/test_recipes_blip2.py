"""The recipes of BLIP-2: what trains of them, in what they differ, and what the paper says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from latentmodal.experiments.recipe import load_recipe, shipped_recipes
from latentmodal.experiments.systems.alignment import AlignmentConfig, AlignmentSystem
from latentmodal.experiments.systems.generation import GenerationSystem
from latentmodal.experiments.training.freeze import FreezePlan, freeze_rows
from meta_models import built

BLIP2 = [name for name in shipped_recipes() if name.startswith("blip2/")]

# LAVIS' Q-Former, heads, projection and ln_vision, counted in its own models.
TRAINABLE = {
    "blip2/stage1_vitg": 186_705_470,
    "blip2/stage1_vitl": 183_165_758,
    "blip2/stage2_vitg_opt2.7b": 107_133_696,
    "blip2/stage2_vitg_opt6.7b": 108_314_880,
    "blip2/stage2_vitg_flant5xl": 106_739_968,
    "blip2/stage2_vitg_flant5xxl": 108_314_880,
}


def shards(urls: str, weight: float = 1.0) -> dict[str, Any]:
    source = {"name": "shards", "urls": f"data/{urls}/*.tar", "weight": weight}
    return {**source, "caption": "random", "num_samples": None}


def captions_task(urls: str) -> dict[str, Any]:
    rest = {"prompt": None, "generation": None, "with_java": False, "baseline": None}
    return {"name": "captions", "source": shards(urls), **rest}


def itm_task(urls: str) -> dict[str, Any]:
    rest = {"ks": [1, 5, 10], "captions": "all", "top_k": 128}
    return {"name": "itm_retrieval", "source": shards(urls), **rest}


FINETUNED = {
    "freeze.image_encoder.*": 1.0,
    "system.image_encoder.image_size": 364,
    "system.pretrained.format": "lavis",
    "data.train": [shards("coco_karpathy_train")],
    "data.loader.draft_side": 600,
    "optim.lr": 1e-5,
    "optim.betas": [0.9, 0.999],
    "optim.warmup_steps": 1000,
    "optim.warmup_start_lr": 1e-8,
    "optim.min_lr": 0.0,
    "trainer.activation_checkpointing": True,
}

EIGHT_THINGS = {
    "name": "emoji",
    "preset": "pairs",
    "seed": 0,
    "split": "train",
    "weight": 1.0,
    "caption": "first",
}
JUDGED_ON_EIGHT_THINGS = {
    "evaluation.tasks.unseen_pairs.source.preset": "pairs",
    "evaluation.tasks.unseen_pairs.source.split": "arrangements",
    "evaluation.tasks.unseen_pairs.baseline.preset": "pairs",
}

# Everything in which a recipe differs from its base, name and description aside.
DIFFERS: dict[str, dict[str, Any]] = {
    "blip2/stage1_vitl": {
        "system.image_encoder.model": "vit_large_patch14_clip_224.openai",
        "system.image_encoder.activation": "quick_gelu",
        "data.loader.batch_size": 145,
    },
    "blip2/stage2_vitg_opt6.7b": {"system.llm.model": "facebook/opt-6.7b"},
    "blip2/stage2_vitg_flant5xl": {
        "system.llm.name": "seq2seq",
        "system.llm.model": "google/flan-t5-xl",
        "system.llm.config_overrides.dense_act_fn": "gelu",
        "system.prompt.text": "{image}{answer}{eos}",
        "system.prompt.end": None,
        "system.prompt.label_bos": False,
        "system.prompt.prefix_split": True,
    },
    "blip2/stage2_vitg_flant5xxl": {"system.llm.model": "google/flan-t5-xxl"},
    "blip2/caption_coco": {
        **FINETUNED,
        "system.pretrained.path": "weights/blip2_pretrained_opt2.7b.pth",
        "system.prompt.text": "{image}{bos}a photo of {answer}{eos}",
        "system.prompt.label_bos": False,
        "data.loader.batch_size": 16,
        "optim.layer_decay.image_encoder.*": 1.0,
        "trainer.max_steps": 11070,
        "trainer.eval_every": 2214,
        "evaluation.batch_size": 16,
        "evaluation.tasks.coco_test": captions_task("coco_karpathy_test"),
        "evaluation.tasks.nocaps_val": captions_task("nocaps_val"),
    },
    "blip2/retrieval_coco": {
        "system.tokenizer.context_length": 35,
        **FINETUNED,
        "system.pretrained.path": "weights/blip2_pretrained.pth",
        "data.loader.batch_size": 14,
        "optim.layer_decay.image_encoder.*": 0.95,
        "trainer.max_steps": 12650,
        "trainer.eval_every": 2530,
        "evaluation.batch_size": 32,
        "evaluation.tasks.coco_test": itm_task("coco_karpathy_test"),
        "evaluation.tasks.flickr_test": itm_task("flickr30k_test"),
    },
    "blip2/vqa_v2": {
        "system.image_encoder.image_size": 490,
        "system.prompt.text": "{image}{bos}Question: {question} Answer: {answer}{eos}",
        "system.prompt.max_text_tokens": 10,
        "system.target": "answer",
        "system.generation.max_new_tokens": 10,
        "system.generation.min_new_tokens": 1,
        "system.generation.length_penalty": 0.0,
        "data.train": [shards("vqav2_train")],
        "data.loader.batch_size": 8,
        "data.loader.draft_side": 810,
        "optim.layer_decay.image_encoder.*": 0.95,
        "trainer.max_steps": 17330,
        "trainer.eval_every": 3466,
        "evaluation.tasks.coco_val": "absent",
        "evaluation.tasks.coco_test": "absent",
        "evaluation.tasks.nocaps_val": "absent",
        "evaluation.tasks.vqav2_val": {
            "name": "vqa",
            "source": shards("vqav2_val"),
            "prompt": None,
            "generation": None,
            "scoring": "mmf",
            "baseline": None,
        },
    },
    "blip2/stage1_emoji_16_queries": {"system.bridge.num_queries": 16},
    "blip2/stage1_emoji_no_itg": {
        "system.objectives.itg": 0.0,
        "evaluation.tasks.swapped_by_itg": "absent",
        "evaluation.tasks.captions": "absent",
    },
    "blip2/stage1_emoji_no_itm": {
        "system.objectives.itm": 0.0,
        "evaluation.tasks.swapped_by_itm": "absent",
        "evaluation.tasks.unseen_pairs_itm": "absent",
    },
    "blip2/stage1_emoji_pairs": {
        "system.bridge.input_position_init": "sincos",
        "data.train": [EIGHT_THINGS],
        "data.loader.match": "fact",
        "trainer.max_steps": 2000,
        "trainer.eval_every": 250,
        "evaluation.tasks.unseen_pairs": "absent",
        "evaluation.tasks.unseen_pairs_itm": "absent",
        **{
            f"evaluation.tasks.{task}.source.{key}": value
            for task in ("swapped_by_itc", "swapped_by_itm", "swapped_by_itg", "captions")
            for key, value in (("preset", "pairs"), ("split", "arrangements"))
        },
        "evaluation.tasks.captions.baseline.preset": "pairs",
    },
    "blip2/stage2_emoji_quick": {
        "system.llm.model": "runs/lm-emoji/seed0/llm",
        "system.llm.gguf": None,
        "data.loader.batch_size": 64,
        "trainer.max_steps": 400,
        "trainer.eval_every": 400,
    },
    "blip2/stage2_emoji_pairs": {
        "system.pretrained.path": "runs/blip2-stage1_emoji_pairs/seed0",
        "system.llm.model": "runs/lm-emoji_names/seed0/llm",
        "data.train": [EIGHT_THINGS],
        **JUDGED_ON_EIGHT_THINGS,
    },
    "blip2/stage2_emoji_pairs_smollm2": {
        "system.pretrained.path": "runs/blip2-stage1_emoji_pairs/seed0",
        "data.train": [EIGHT_THINGS],
        "trainer.max_steps": 300,
        "trainer.eval_every": 300,
        **JUDGED_ON_EIGHT_THINGS,
    },
}


@pytest.mark.parametrize("name", BLIP2)
def test_builds_on_the_meta_device_and_trains_what_it_says(name: str) -> None:
    recipe, model = load_recipe(name), built(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    finetuned = name in ("blip2/caption_coco", "blip2/retrieval_coco", "blip2/vqa_v2")
    assert ("image_encoder" in trainable) == finetuned
    assert "bridge" in trainable
    assert not trainable & frozen, "a part is frozen as a whole or not at all"
    assert frozen <= {"image_encoder", "llm"}
    assert hasattr(model, "llm") == ("llm" in frozen)
    total = freeze_rows(model, FreezePlan(recipe.freeze), recipe.optim.lr)[-1]
    assert total.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not model.image_encoder.training or finetuned


@pytest.mark.parametrize("name", BLIP2)
def test_tasks_find_what_they_need_in_the_system(name: str) -> None:
    """A recipe that drops an objective drops the tasks that would ask for it."""
    recipe = load_recipe(name)
    aligned = isinstance(recipe.system, AlignmentConfig)
    system: Any = object.__new__(AlignmentSystem if aligned else GenerationSystem)
    nn.Module.__init__(system)
    system.model, system.config = built(name), recipe.system
    for task in recipe.evaluation.tasks.values():
        task.check(system)


@pytest.mark.parametrize("name", TRAINABLE)
def test_as_many_parameters_train_as_in_the_reference(name: str) -> None:
    parameters = built(name).parameters()
    assert sum(p.numel() for p in parameters if p.requires_grad) == TRAINABLE[name]


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("blip2/stage1_vitg", 224, 257),
        ("blip2/stage1_vitl", 224, 257),
        ("blip2/caption_coco", 364, 677),
        ("blip2/retrieval_coco", 364, 677),
        ("blip2/vqa_v2", 490, 1226),
        ("blip2/stage1_emoji", 96, 36),
        ("blip2/stage2_emoji", 96, 36),
    ],
)
def test_pictures_have_the_published_size(name: str, size: int, tokens: int) -> None:
    encoder = built(name).image_encoder
    assert encoder.preprocess.size == size
    assert encoder.num_tokens == tokens


def test_every_recipe_with_a_base_is_in_the_table(base_of: Callable[[str], str | None]) -> None:
    assert {name for name in BLIP2 if base_of(name)} == DIFFERS.keys()


@pytest.mark.parametrize("name", DIFFERS)
def test_differs_from_its_base_in_these_keys_only(
    name: str, changes: Callable[[str], dict[str, Any]]
) -> None:
    assert changes(name) == DIFFERS[name]


@pytest.mark.parametrize(
    ("name", "lr", "min_lr", "start", "warmup", "batch", "steps"),
    [
        # LAVIS' pretrain_stage1 but for the steps, which the paper's section 3.4 gives.
        ("blip2/stage1_vitg", 1e-4, 1e-5, 1e-6, 5000, 1600, 250_000),
        # The paper's batch of 2320 pairs for ViT-L.
        ("blip2/stage1_vitl", 1e-4, 1e-5, 1e-6, 5000, 2320, 250_000),
        # LAVIS' pretrain_stage2, and the paper's steps.
        ("blip2/stage2_vitg_opt2.7b", 1e-4, 1e-5, 1e-6, 2000, 1024, 80_000),
        ("blip2/stage2_vitg_opt6.7b", 1e-4, 1e-5, 1e-6, 2000, 1024, 80_000),
        ("blip2/stage2_vitg_flant5xl", 1e-4, 1e-5, 1e-6, 2000, 1024, 80_000),
        ("blip2/stage2_vitg_flant5xxl", 1e-4, 1e-5, 1e-6, 2000, 1024, 80_000),
        # LAVIS' caption_coco_ft and retrieval_coco_ft: 5 epochs of 566,747 captions.
        ("blip2/caption_coco", 1e-5, 0.0, 1e-8, 1000, 256, 5 * 566_747 // 256 + 1),
        ("blip2/retrieval_coco", 1e-5, 0.0, 1e-8, 1000, 224, 5 * 566_747 // 224),
        # The paper's appendix; LAVIS never released it. Steps: 5 epochs, to the ten.
        ("blip2/vqa_v2", 1e-5, 0.0, 1e-8, 1000, 128, 5 * 443_757 // 1_280 * 10),
    ],
)
def test_published_settings(
    name: str, lr: float, min_lr: float, start: float, warmup: int, batch: int, steps: int
) -> None:
    recipe = load_recipe(name)
    optim, trainer = recipe.optim, recipe.trainer
    assert (optim.lr, optim.min_lr, optim.warmup_start_lr) == (lr, min_lr, start)
    assert optim.warmup_steps == warmup
    # Section 3.4 gives beta2 for pretraining; LAVIS fine-tunes at 0.999 and clips no gradients.
    beta2 = 0.98 if "stage" in name else 0.999
    assert (optim.betas, optim.weight_decay, optim.grad_clip) == ((0.9, beta2), 0.05, None)
    assert recipe.data.loader.batch_size * trainer.world_size == batch
    assert trainer.max_steps == steps


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("blip2/caption_coco", 1.0),
        ("blip2/retrieval_coco", 0.95),
        ("blip2/vqa_v2", 0.95),
    ],
)
def test_layer_decay_is_that_of_the_paper_for_opt_2_7b(name: str, decay: float) -> None:
    assert load_recipe(name).optim.layer_decay == {"image_encoder.*": decay}


def test_the_second_stage_leaves_the_language_model_in_bfloat16_and_frozen() -> None:
    model = built("blip2/stage2_vitg_flant5xxl")
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.bridge.parameters()} == {torch.float32}
    feed_forwards = [m for m in model.modules() if hasattr(m, "wi_0")]
    assert len(feed_forwards) == 48
    assert {type(m.act).__name__ for m in feed_forwards} == {"GELUActivation"}, "not gelu_new"
    assert model.llm.width == model.bridge.out_dim == 4096
