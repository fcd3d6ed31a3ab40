"""Our CLIP towers equal transformers' and open_clip's: outputs, gradients, conversions."""

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from latentmodal.encoders import convert

UNUSED = ("logit_scale", "logit_bias")  # scalars of the head: these tests compare features


def hf_clip(activation: str) -> CLIPModel:
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config={
            **common,
            "hidden_size": 16,
            "intermediate_size": 64,
            "vocab_size": 60,
            "max_position_embeddings": 10,
            "eos_token_id": 59,
            "bos_token_id": 58,
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
    model: CLIPModel = CLIPModel(config).double()
    return model


def open_clip_clip(activation: str, *, custom_text: bool = False) -> nn.Module:
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model: nn.Module = cls(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        text_cfg={"context_length": 10, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2},
        quick_gelu=activation == "quick_gelu",
    ).double()
    return model


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(
    activation: str,
    make_dual_encoder: Callable[..., Any],
    batch: Callable[..., Any],
    assert_same: Callable[..., None],
) -> None:
    ours, theirs = make_dual_encoder(siglip=False, activation=activation), hf_clip(activation)
    theirs.load_state_dict(convert.to_hf_clip(ours.state_dict()).state)
    data = batch(ours)
    output = theirs(pixel_values=data.normalised_BCHW, input_ids=data.ids_BT)
    assert_same(
        ours,
        ours(data.pixels_BCHW, data.ids_BT),
        theirs,
        (output.image_embeds, output.text_embeds),
        lambda state: convert.to_hf_clip(state).state,
        UNUSED,
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_equals_open_clip(
    activation: str,
    custom_text: bool,
    make_dual_encoder: Callable[..., Any],
    batch: Callable[..., Any],
    assert_same: Callable[..., None],
) -> None:
    ours = make_dual_encoder(siglip=False, activation=activation)
    theirs = open_clip_clip(activation, custom_text=custom_text)
    theirs.load_state_dict(convert.to_open_clip(ours.state_dict(), custom_text=custom_text).state)
    data = batch(ours)
    image, text, _ = theirs(data.normalised_BCHW, data.ids_BT)
    assert_same(
        ours,
        ours(data.pixels_BCHW, data.ids_BT),
        theirs,
        (image, text),
        lambda state: convert.to_open_clip(state, custom_text=custom_text).state,
        UNUSED,
    )


def test_the_wrong_activation_is_visible(
    make_dual_encoder: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    ours = make_dual_encoder(siglip=False, activation="gelu")
    theirs = hf_clip("quick_gelu")
    theirs.load_state_dict(convert.to_hf_clip(ours.state_dict()).state)
    data = batch(ours)
    output = theirs(pixel_values=data.normalised_BCHW, input_ids=data.ids_BT)
    assert not torch.allclose(ours(data.pixels_BCHW, data.ids_BT)[0], output.image_embeds, 1e-5)


@pytest.mark.parametrize("layout", ["transformers", "open_clip", "custom_text"])
def test_round_trip_is_exact_both_ways(layout: str, make_dual_encoder: Callable[..., Any]) -> None:
    if layout == "transformers":
        theirs = hf_clip("gelu").state_dict()
        to, back = convert.to_hf_clip, convert.from_hf_clip
    else:
        custom = layout == "custom_text"
        theirs = open_clip_clip("gelu", custom_text=custom).state_dict()
        back = convert.from_open_clip

        def to(state: dict[str, torch.Tensor]) -> convert.Converted:
            return convert.to_open_clip(state, custom_text=custom)

    ours, unmatched = back(theirs)
    assert unmatched == []
    assert_equal_states(to(ours).state, theirs)

    start = make_dual_encoder(siglip=False, activation="gelu").state_dict()
    converted, unmatched = to(start)
    assert unmatched == []
    assert_equal_states(back(converted).state, start)
    pointers = [tensor.data_ptr() for tensor in converted.values()]
    assert len(set(pointers)) == len(pointers), "tensors sharing memory cannot be saved"


def test_openai_extras_are_dropped_and_strangers_are_listed() -> None:
    state = open_clip_clip("quick_gelu").state_dict()
    extras = {name: torch.tensor(7) for name in ("input_resolution", "context_length")}
    strangers = {"visual.attnpool.q_proj.weight": torch.zeros(2), "nonsense": torch.zeros(1)}
    converted = convert.from_open_clip({**state, **extras, **strangers})
    assert converted.unmatched == sorted(strangers)
    assert_equal_states(converted.state, convert.from_open_clip(state).state)


def assert_equal_states(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name
