"""Every bridge can be named in a recipe: tower and language model decide its shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from latentmodal.bridges import BRIDGES
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.systems.vision_language import VisionLanguageModel
from latentmodal.llm import CausalConfig

RECIPE = "minigpt4/stage1_emoji"  # 36 patches
TOKENS: dict[str, tuple[str, int]] = {
    "linear": ("{name: linear}", 36),
    "mlp": ("{name: mlp, depth: 3}", 36),
    "token_merge": ("{name: token_merge}", 9),
    "pixel_shuffle": ("{name: pixel_shuffle, factor: 3}", 4),
    "average_pool": ("{name: average_pool, num_output_tokens: 9}", 9),
    "qformer": ("{name: qformer, width: 24, heads: 2, num_input_positions: 36}", 32),
    "resampler": ("{name: resampler, layers: 2}", 64),
    "c_abstractor": ("{name: c_abstractor, num_output_tokens: 16}", 16),
    "identity": ("{name: identity}", 36),
    "chain": ("{name: chain, parts: [{name: average_pool, num_output_tokens: 9}, {name: mlp}]}", 9),
    "chain: mapped, then pooled": (
        "{name: chain, parts: [{name: mlp}, {name: average_pool, num_output_tokens: 9}]}",
        9,
    ),
    "chain: resampled, then a Q-Former": (
        "{name: chain, parts: [{name: resampler, num_queries: 8}, {name: qformer, width: 24, "
        "heads: 2, num_input_positions: 8, num_queries: 5}]}",
        5,
    ),
    "chain: a Q-Former of its own width, then a map": (
        "{name: chain, parts: [{name: qformer, width: 24, heads: 2}, {name: identity}, "
        "{name: linear}]}",
        32,
    ),
    "chain: nothing but poolings": (
        "{name: chain, parts: [{name: average_pool, num_output_tokens: 9}, {name: average_pool, "
        "num_output_tokens: 4}]}",
        4,
    ),
}
KEEP_THE_WIDTH = ("average_pool", "identity", "chain: nothing but poolings")


def built(bridge: str, *, like_tower: bool) -> VisionLanguageModel:
    """The recipe's model on the meta device, with a small language model."""
    system: Any = load_recipe(RECIPE, [f"system.bridge={bridge}"]).system
    own = load_recipe("clip/emoji").system.image_encoder
    image = dataclasses.replace(own, model_kwargs={**own.model_kwargs, "output_stride": 16})
    width = image.build().width if like_tower else 20
    llm = CausalConfig(
        config={
            "model_type": "llama",
            "vocab_size": 16,
            "hidden_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        }
    )
    system = dataclasses.replace(system, image_encoder=image, llm=llm)
    with torch.device("meta"):
        model: VisionLanguageModel = system.build_model()
    return model


def test_every_bridge_is_tried() -> None:
    assert {case.split(":")[0] for case in TOKENS} == set(BRIDGES)


@pytest.mark.parametrize("case", TOKENS)
def test_fits_between_tower_and_language_model(case: str) -> None:
    bridge, tokens = TOKENS[case]
    model = built(bridge, like_tower=case in KEEP_THE_WIDTH)
    assert model.bridge.num_output_tokens == tokens
    features_BND = torch.empty(2, 36, model.image_encoder.width, device="meta")
    assert model.bridge(features_BND).shape == (2, tokens, model.llm.width)


@pytest.mark.parametrize("case", KEEP_THE_WIDTH)
def test_what_keeps_the_width_needs_a_map(case: str) -> None:
    with pytest.raises(ValueError, match="chain it with one that maps"):
        built(TOKENS[case][0], like_tower=False)


@pytest.mark.parametrize(
    ("bridge", "message"),
    [
        ("{name: qformer, num_input_positions: 49}", "read 49 tokens, but 36 come in"),
        (
            "{name: chain, parts: [{name: token_merge}, {name: qformer, num_input_positions: 36}]}",
            "read 36 tokens, but 9 come in",
        ),
        ("{name: average_pool, num_output_tokens: 49}", "give at most 36"),
        ("{name: c_abstractor, num_output_tokens: 9, skip_tokens: 1}", "35 tokens are not a grid"),
    ],
)
def test_what_does_not_fit_is_said_before_training(bridge: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(bridge, like_tower=True)


@pytest.mark.parametrize(
    ("bridge", "message"),
    [
        ("{name: resampler, in_dim: 3}", "system.bridge.in_dim"),
        ("{name: average_pool, num_output_tokens: 8}", "a square such as 4 or 9"),
        ("{name: c_abstractor, depth: 0}", "depth is 0"),
        ("{name: resamplr}", "did you mean 'resampler'"),
    ],
)
def test_mistakes_are_said_on_reading(bridge: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(RECIPE, [f"system.bridge={bridge}"])
