"""Our SigLIP towers equal transformers' and open_clip's: outputs, gradients, conversions."""

from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
from torch import nn
from transformers import SiglipConfig, SiglipModel

from latentmodal.encoders import convert

UNUSED = ("logit_scale", "logit_bias")  # scalars of the head: these tests compare features
TINY_TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def hf_siglip() -> SiglipModel:
    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 128,
    }
    config = SiglipConfig(
        text_config={**common, "vocab_size": 60, "max_position_embeddings": 10},
        vision_config={**common, "image_size": 32, "patch_size": 8},
    )
    model: SiglipModel = SiglipModel(config).double()
    return model


def open_clip_siglip() -> nn.Module:
    """open_clip builds full-size timm towers only: its trunk is swapped for a tiny one."""
    model: nn.Module = open_clip.CustomTextCLIP(
        embed_dim=32,
        vision_cfg={
            "image_size": 224,
            "timm_model_name": "vit_small_patch16_224",
            "timm_pool": "avg",
            "timm_proj": "none",
        },
        text_cfg={
            "context_length": 10,
            "vocab_size": 60,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
        init_logit_bias=-10.0,
    )
    model.visual.trunk = timm.create_model(
        "vit_base_patch16_siglip_224", num_classes=0, **TINY_TRUNK
    )
    return model.double()


def test_equals_transformers(
    make_dual_encoder: Callable[..., Any],
    batch: Callable[..., Any],
    assert_same: Callable[..., None],
) -> None:
    ours, theirs = make_dual_encoder(siglip=True, activation="gelu_tanh"), hf_siglip()
    theirs.load_state_dict(convert.to_hf_siglip(ours.state_dict()).state)
    data = batch(ours)
    output = theirs(pixel_values=data.normalised_BCHW, input_ids=data.ids_BT)
    assert_same(
        ours,
        ours(data.pixels_BCHW, data.ids_BT),
        theirs,
        (output.image_embeds, output.text_embeds),
        lambda state: convert.to_hf_siglip(state).state,
        UNUSED,
    )


def test_equals_open_clip(
    make_dual_encoder: Callable[..., Any],
    batch: Callable[..., Any],
    assert_same: Callable[..., None],
) -> None:
    def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert.to_open_clip(state, timm_visual=True, custom_text=True).state

    ours, theirs = make_dual_encoder(siglip=True, activation="gelu"), open_clip_siglip()
    theirs.load_state_dict(to_open_clip(ours.state_dict()))
    data = batch(ours)
    image, text, *_ = theirs(data.normalised_BCHW, data.ids_BT)
    assert_same(
        ours, ours(data.pixels_BCHW, data.ids_BT), theirs, (image, text), to_open_clip, UNUSED
    )


def test_round_trips_are_exact(make_dual_encoder: Callable[..., Any]) -> None:
    ours = make_dual_encoder(siglip=True, activation="gelu").state_dict()
    for theirs, to, back in (
        (hf_siglip().state_dict(), convert.to_hf_siglip, convert.from_hf_siglip),
        (
            open_clip_siglip().state_dict(),
            lambda s: convert.to_open_clip(s, timm_visual=True, custom_text=True),
            convert.from_open_clip,
        ),
    ):
        converted, unmatched = back(theirs)
        assert unmatched == []
        assert_equal_states(to(converted).state, theirs)
        converted, unmatched = to(ours)
        assert unmatched == []
        assert_equal_states(back(converted).state, ours)


def test_timm_round_trip_leaves_the_classifier_out() -> None:
    timm_state = timm.create_model("vit_base_patch16_clip_224", **TINY_TRUNK).state_dict()
    converted = convert.from_timm(timm_state)
    assert converted.unmatched == ["head.bias", "head.weight"]
    back = convert.to_timm({**converted.state, "text_encoder.pos_embed": torch.zeros(1)})
    assert back.unmatched == ["text_encoder.pos_embed"]
    assert_equal_states(
        back.state, {k: v for k, v in timm_state.items() if not k.startswith("head.")}
    )


def assert_equal_states(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name
