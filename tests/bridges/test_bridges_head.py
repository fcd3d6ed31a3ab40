"""The contrastive head: what it returns, how it starts, what its config refuses."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from latentmodal.bridges import ContrastiveHead, ContrastiveHeadConfig


def make_head(**fields: Any) -> ContrastiveHead:
    return ContrastiveHeadConfig(**{"image_dim": 5, "text_dim": 3, "embed_dim": 4} | fields).build()


def test_forward_projects_and_normalises() -> None:
    head = make_head(init_logit_scale=math.log(10), init_logit_bias=-10.0)
    image, text = torch.randn(2, 5), torch.randn(6, 3)
    out = head(image, text)
    expected = image @ head.image_proj.weight.T
    torch.testing.assert_close(out.image_BE, expected / expected.norm(dim=1, keepdim=True))
    assert out.text_BE.shape == (6, 4)
    torch.testing.assert_close(out.text_BE.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(out.logit_scale, torch.tensor([10.0]))
    torch.testing.assert_close(out.logit_bias, torch.tensor([-10.0]))
    assert torch.equal(out.image_BE, head.embed_image(image))
    assert torch.equal(out.text_BE, head.embed_text(text))


def test_gradients_reach_scale_and_bias() -> None:
    head = make_head(init_logit_bias=-10.0)
    out = head(torch.randn(2, 5), torch.randn(2, 3))
    (out.logit_scale + out.logit_bias).sum().backward()
    torch.testing.assert_close(head.logit_scale.grad, torch.tensor([1 / 0.07]))
    assert head.logit_bias.grad.tolist() == [1.0]


def test_clip_head_has_no_bias_and_siglip_parameters_are_vectors() -> None:
    clip = dict(make_head().named_parameters())
    assert sorted(clip) == ["image_proj.weight", "logit_scale", "text_proj.weight"]
    siglip = make_head(init_logit_bias=-10.0, text_bias=True)
    assert siglip.text_proj.bias.tolist() == [0.0] * 4
    assert siglip.logit_scale.shape == siglip.logit_bias.shape == (1,)
    assert make_head()(torch.randn(1, 5), torch.randn(1, 3)).logit_bias is None


def test_projection_none_is_identity() -> None:
    head = make_head(image_dim=4, image_projection="none")
    assert isinstance(head.image_proj, nn.Identity)
    x = torch.randn(2, 4)
    torch.testing.assert_close(head.embed_image(x), nn.functional.normalize(x, dim=1))


def test_projections_start_as_in_clip() -> None:
    torch.manual_seed(0)
    head = make_head(image_dim=400, text_dim=100, embed_dim=300)
    assert head.image_proj.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert head.text_proj.weight.std().item() == pytest.approx(100**-0.5, rel=0.02)


@pytest.mark.parametrize(("stored", "kept"), [(-1.0, 0.0), (3.0, 3.0), (9.0, math.log(100))])
def test_clamp_temperature(stored: float, kept: float) -> None:
    head = make_head()
    parameter = head.logit_scale
    with torch.no_grad():
        parameter.fill_(stored)
    head.clamp_temperature_()
    assert head.logit_scale is parameter and parameter.requires_grad
    assert parameter.item() == pytest.approx(kept)


def test_builds_without_data_and_initialises_later() -> None:
    config = ContrastiveHeadConfig(image_dim=64, text_dim=32, embed_dim=48, init_logit_bias=-10.0)
    with torch.device("meta"):
        head = config.build()
    assert all(parameter.is_meta for parameter in head.parameters())
    head.to_empty(device="cpu")
    # PyTorch's usual loop, which visits parents before children.
    torch.manual_seed(0)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert head.image_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert head.text_proj.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert head.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert head.logit_bias.item() == -10.0


def test_embeddings_are_wide_under_autocast() -> None:
    head = make_head()
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(2, 5), torch.randn(2, 3))
    assert out.image_BE.dtype == out.logit_scale.dtype == torch.float32
    torch.testing.assert_close(out.image_BE.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_dim": 0}, "image_dim is 0"),
        ({"embed_dim": "4"}, "embed_dim is '4'"),
        ({"text_projection": "mlp"}, "text_projection is 'mlp'; choose from linear, none"),
        ({"text_projection": "none"}, "text_dim=3 differs from embed_dim=4"),
        (
            {"text_dim": 4, "text_projection": "none", "text_bias": True},
            "text_bias is true but text_projection is 'none'",
        ),
        ({"init_logit_scale": 10.0}, "init_logit_scale is 10.0"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_head(**fields)
