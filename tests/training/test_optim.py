"""AdamW's groups and the schedule: what decays, how fast each part goes, and when."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from latentmodal.encoders import (
    HfImageConfig,
    HfTextConfig,
    TextTransformerConfig,
    TimmImageConfig,
)
from latentmodal.experiments.systems.contrastive import ContrastiveConfig, HeadConfig
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan, freeze_rows
from latentmodal.experiments.training.layer_decay import layer_multipliers
from latentmodal.experiments.training.optim import (
    build_adamw,
    decays,
    parameter_groups,
    warmup_cosine,
)

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
VIT = TimmImageConfig(
    model="vit_base_patch16_clip_224.openai",
    image_size=16,
    model_kwargs={"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 1},
)
TEXT = TextTransformerConfig(vocab_size=20, context_length=6, width=16, depth=1, heads=2, eot_id=2)
HF_IMAGE = HfImageConfig(
    config={
        **TINY,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
)
HF_TEXT = HfTextConfig(
    config={**TINY, "model_type": "bert", "num_attention_heads": 2, "vocab_size": 20}
)


def system(image: Any, text: Any, rules: dict[str, Any], **optim: Any) -> Any:
    config = ContrastiveConfig(
        image_encoder=image,
        text_encoder=text,
        tokenizer=None,
        head=HeadConfig(embed_dim=8, init_logit_bias=-10.0, text_bias=True),
        loss="sigmoid",
    )
    trainer = TrainerConfig(max_steps=10, accelerator="cpu")
    return config.build(FreezePlan(rules), OptimConfig(**optim), trainer)


def by_name(module: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    group_of = {id(p): group for group in groups for p in group["params"]}
    return {name: group_of[id(p)] for name, p in module.named_parameters() if id(p) in group_of}


@pytest.mark.parametrize(
    ("image", "text", "undecayed"),
    [
        (
            VIT,
            TEXT,
            {"image_encoder.trunk.pos_embed", "image_encoder.trunk.cls_token"}
            | {"image_encoder.trunk.reg_token", "text_encoder.pos_embed"},
        ),
        (
            HF_IMAGE,
            HF_TEXT,
            {
                "image_encoder.model.embeddings.position_embedding.weight",
                "text_encoder.model.embeddings.position_embeddings.weight",
            },
        ),
    ],
    ids=["timm", "transformers"],
)
def test_only_maps_decay(image: Any, text: Any, undecayed: set[str]) -> None:
    model = system(image, text, {}).model
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert undecayed <= matrices
    for name, parameter in model.named_parameters():
        expected = name in matrices - undecayed
        assert decays(name, parameter) == expected, name
        if name.endswith(".bias") or "norm" in name or "logit" in name:
            assert not expected, name
    kernels = ("head.image_proj.weight", "head.text_proj.weight")
    assert all(decays(name, model.get_parameter(name)) for name in kernels)


def test_groups_hold_every_trainable_parameter_once() -> None:
    rules = {"image_encoder.trunk.blocks.0.*": "frozen", "image_encoder.*": 0.1, "head.*": 2}
    built = system(VIT, TEXT, rules, lr=1e-3, weight_decay=0.3)
    groups = parameter_groups(built.model, built.plan, built.optim)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in built.model.parameters() if p.requires_grad)
    of = by_name(built.model, groups)
    assert not [name for name in of if "trunk.blocks.0." in name]
    for name, rate, decay in (
        ("image_encoder.trunk.blocks.1.attn.qkv.weight", 1e-4, 0.3),
        ("image_encoder.trunk.blocks.1.attn.qkv.bias", 1e-4, 0.0),
        ("image_encoder.trunk.pos_embed", 1e-4, 0.0),
        ("text_encoder.token_embed.weight", 1e-3, 0.3),
        ("text_encoder.norm.weight", 1e-3, 0.0),
        ("head.image_proj.weight", 2e-3, 0.3),
        ("head.text_proj.bias", 2e-3, 0.0),
        ("head.logit_scale", 2e-3, 0.0),
        ("head.logit_bias", 2e-3, 0.0),
    ):
        assert (of[name]["lr"], of[name]["weight_decay"]) == (pytest.approx(rate), decay), name


def test_multipliers_survive_activation_checkpointing() -> None:
    """The wrapper it puts round each block must not hide names from the plan."""
    rules = {"text_encoder.blocks.0.attn.*": 0.25}
    config = TrainerConfig(max_steps=10, accelerator="cpu", activation_checkpointing=True)
    built = system(VIT, TEXT, rules, lr=1e-3)
    built.trainer_config = config
    built.configure_model()
    assert any("_checkpoint_wrapped_module" in name for name, _ in built.model.named_parameters())
    optimizer = built.configure_optimizers()["optimizer"]
    slow = [
        p
        for group in optimizer.param_groups
        if group["initial_lr"] == 2.5e-4
        for p in group["params"]
    ]
    attention = [
        p
        for name, p in built.model.named_parameters()
        if ".attn." in name and name.startswith("text_encoder")
    ]
    assert {id(p) for p in slow} == {id(p) for p in attention} and len(attention) == 4


def test_optimiser_is_what_the_recipe_says() -> None:
    built = system(VIT, TEXT, {}, lr=1e-3, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.3)
    optimizer = built.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)
        assert group["weight_decay"] in (0.0, 0.3)


def rates(config: OptimConfig, steps: int, until: int, scale: float = 1.0) -> list[float]:
    """The learning rate each optimiser step is taken with."""
    weight = nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [weight], "lr": config.lr * scale, "weight_decay": 0.0}]
    optimizer = build_adamw(groups, config)
    schedule = warmup_cosine(optimizer, config, steps)
    seen = []
    for _ in range(until):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_warmup_then_cosine() -> None:
    seen = rates(OptimConfig(lr=2.0, warmup_steps=4), steps=24, until=30)
    assert seen[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])  # never 0: the first step counts
    assert seen[4] == pytest.approx(2.0)  # the cosine begins at the peak
    assert seen[9] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert seen[14] == pytest.approx(1.0)  # half-way from 4 to 24
    assert 0 < seen[23] < 0.02
    assert seen[24:] == pytest.approx([0.0] * 6, abs=1e-12)  # past the end it stays down
    assert seen[4:25] == sorted(seen[4:25], reverse=True)


@pytest.mark.parametrize("warmup", [0, 1])
def test_without_warmup_the_first_step_is_at_the_peak(warmup: int) -> None:
    assert rates(OptimConfig(lr=2.0, warmup_steps=warmup), 10, 1) == [2.0]


def test_floor_and_multiplier() -> None:
    config = OptimConfig(lr=2.0, min_lr=0.2)
    assert rates(config, 10, 12)[-1] == pytest.approx(0.2)
    assert rates(config, 10, 12, scale=0.5)[-1] == pytest.approx(0.1)
    assert rates(config, 10, 6)[5] == pytest.approx((2.0 + 0.2) / 2)


def test_a_warmup_longer_than_the_run_only_rises() -> None:
    assert rates(OptimConfig(lr=1.0, warmup_steps=10), 4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_warmup_from_a_stated_rate(scale: float) -> None:
    """BLIP-2's stage 1 in small: 1e-6 at the first step, the peak at the last of the warmup."""
    config = OptimConfig(lr=1e-4, warmup_steps=5, warmup_start_lr=1e-6, min_lr=1e-5)
    seen = rates(config, steps=15, until=17, scale=scale)
    assert seen[0] == pytest.approx(scale * 1e-6, rel=1e-12)
    assert seen[2] == pytest.approx(scale * (1e-6 + (1e-4 - 1e-6) * 2 / 5), rel=1e-12)
    assert seen[5] == pytest.approx(scale * 1e-4, rel=1e-12)
    half = 0.5 * (1 + math.cos(math.pi * 5 / 10))
    assert seen[10] == pytest.approx(scale * (1e-5 + 9e-5 * half), rel=1e-12)
    assert seen[15:] == pytest.approx([scale * 1e-5] * 2, rel=1e-12)
    assert seen[:6] == sorted(seen[:6]) and seen[5:16] == sorted(seen[5:16], reverse=True)
    assert rates(OptimConfig(lr=1.0, warmup_start_lr=0.1), 10, 1) == [1.0]


DECAY = 0.5
TRUNK, MODEL, TEXT_TOWER = "image_encoder.trunk", "image_encoder.model", "text_encoder"


@pytest.mark.parametrize(
    ("image", "pattern", "expected"),
    [
        (
            VIT,
            "image_encoder.*",
            {
                f"{TRUNK}.{name}": DECAY**3
                for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")
            }
            | {f"{TRUNK}.blocks.0.": DECAY**2, f"{TRUNK}.blocks.1.": DECAY, f"{TRUNK}.norm.": 1.0},
        ),
        (
            HF_IMAGE,
            "image_encoder.*",
            {f"{MODEL}.embeddings.": DECAY**2, f"{MODEL}.pre_layrnorm.": DECAY**2}
            | {f"{MODEL}.encoder.layers.0.": DECAY, f"{MODEL}.post_layernorm.": 1.0},
        ),
        (
            VIT,
            "text_encoder.*",
            {f"{TEXT_TOWER}.token_embed.": DECAY**2, f"{TEXT_TOWER}.pos_embed": DECAY**2}
            | {f"{TEXT_TOWER}.blocks.0.": DECAY, f"{TEXT_TOWER}.norm.": 1.0},
        ),
    ],
    ids=["timm", "transformers", "text"],
)
def test_layer_decay_of_every_parameter(
    image: Any, pattern: str, expected: dict[str, float]
) -> None:
    model = system(image, TEXT, {}).model
    multipliers = layer_multipliers(model, {pattern: DECAY})
    tower = pattern.removesuffix("*")
    assert multipliers.keys() == {n for n, _ in model.named_parameters() if n.startswith(tower)}
    seen = set()
    for name, multiplier in multipliers.items():
        (prefix,) = (prefix for prefix in expected if name.startswith(prefix))
        assert multiplier == expected[prefix], name
        seen.add(prefix)
    assert seen == expected.keys()


def test_layer_decay_of_penultimate_features_counts_the_blocks_kept() -> None:
    """BLIP-2's tower: the last block it has gets one decay, and no norm comes after."""
    kwargs = {**VIT.model_kwargs, "depth": 3}
    short = dataclasses.replace(VIT, features="penultimate", model_kwargs=kwargs)
    of = layer_multipliers(system(short, TEXT, {}).model, {"image_encoder.*": 0.9})
    assert of[f"{TRUNK}.blocks.1.attn.qkv.weight"] == 0.9
    assert of[f"{TRUNK}.blocks.0.attn.qkv.weight"] == 0.9**2
    assert of[f"{TRUNK}.pos_embed"] == 0.9**3
    assert max(of.values()) == 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_optimiser_groups_carry_layer_decay_times_the_plan(checkpointing: bool) -> None:
    rules = {"image_encoder.trunk.patch_embed.*": "frozen", "image_encoder.*": 0.1}
    built = system(VIT, TEXT, rules, lr=1e-3, layer_decay={"image_encoder.*": DECAY})
    built.trainer_config = TrainerConfig(
        max_steps=10, accelerator="cpu", activation_checkpointing=checkpointing
    )
    parameters = dict(built.model.named_parameters())
    built.configure_model()
    optimizer = built.configure_optimizers()["optimizer"]
    rate_of = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, layer in (
        ("image_encoder.trunk.cls_token", DECAY**3),
        ("image_encoder.trunk.blocks.0.mlp.fc1.weight", DECAY**2),
        ("image_encoder.trunk.blocks.1.attn.proj.bias", DECAY),
        ("image_encoder.trunk.norm.weight", 1.0),
    ):
        assert rate_of[id(parameters[name])] == pytest.approx(1e-4 * layer, rel=1e-12), name
    assert rate_of[id(parameters["text_encoder.norm.weight"])] == 1e-3
    assert id(parameters["image_encoder.trunk.patch_embed.proj.weight"]) not in rate_of
    assert len(rate_of) == sum(p.requires_grad for p in parameters.values())


def test_the_printed_plan_shows_the_range_of_layer_decay() -> None:
    built = system(VIT, TEXT, {"image_encoder.*": 0.1}, lr=1e-3)
    scales = layer_multipliers(built.model, {"image_encoder.*": DECAY})
    rows = freeze_rows(built.model, built.plan, 1e-3, depth=3, layer_scale=scales)
    shown = {row.module: row.lr for row in rows}
    assert shown["image_encoder.trunk.blocks"] == "2.50e-05 .. 5.00e-05"
    assert shown["image_encoder.trunk.patch_embed"] == "1.25e-05"
    assert shown["image_encoder.trunk.norm"] == "1.00e-04"
    assert shown["text_encoder.norm.weight"] == "1.00e-03"


def test_the_first_layer_decay_pattern_decides() -> None:
    patterns = {"image_encoder.trunk.blocks.1.*": 0.25, "image_encoder.*": DECAY}
    of = layer_multipliers(system(VIT, TEXT, {}).model, patterns)
    assert of["image_encoder.trunk.blocks.1.norm1.weight"] == 0.25
    assert of["image_encoder.trunk.blocks.0.norm1.weight"] == DECAY**2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("image_encodr.*", "'image_encodr.*' matches no parameter"),
        ("text_encoder.*", "everything 'text_encoder.*' matches is frozen"),
        ("head.*", "'head.*' matches no numbered layer"),
        ("*", "layers of image_encoder.trunk.blocks, text_encoder.blocks: give each its own"),
    ],
)
def test_layer_decay_patterns_that_fit_nothing(pattern: str, message: str) -> None:
    model = system(VIT, TEXT, {"text_encoder.*": "frozen"}).model
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        layer_multipliers(model, {pattern: 0.9})
    assert str(caught.value).startswith("optim.layer_decay: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0; it must be above 0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"warmup_start_lr": -1e-6}, "warmup_start_lr is -1e-06; it must lie between 0 and lr"),
        ({"warmup_start_lr": 1.0}, "warmup_start_lr is 1.0; it must lie between 0 and lr"),
        ({"layer_decay": {"a.*": 0.0}}, r"layer_decay: 'a\.\*' is 0.0; give a number above 0"),
        ({"layer_decay": {"a.*": 1.5}}, r"layer_decay: 'a\.\*' is 1.5; give a number above 0"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
