"""The heads of BLIP-2's first stage."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentmodal.bridges import AlignmentHead, AlignmentHeadConfig

WIDTH, EMBED = 6, 4


def make(**fields: Any) -> AlignmentHead:
    torch.manual_seed(0)
    return AlignmentHeadConfig(width=WIDTH, embed_dim=EMBED, **fields).build().double()


def test_embeddings_are_unit_projections() -> None:
    head = make()
    query, text = torch.randn(3, 2, WIDTH).double(), torch.randn(3, WIDTH).double()
    out = head(query, text)
    assert head.image_proj is not None and head.text_proj is not None
    torch.testing.assert_close(out.image_BME, F.normalize(head.image_proj(query), dim=-1))
    torch.testing.assert_close(out.text_BE, F.normalize(head.text_proj(text), dim=-1))
    assert torch.equal(head.embed_image(query), out.image_BME)
    assert torch.equal(head.embed_text(text), out.text_BE)
    assert out.temperature.shape == (1,)
    torch.testing.assert_close(out.temperature.item(), 0.07, rtol=1e-6, atol=0)
    out.temperature.sum().backward()
    assert head.temperature is not None and head.temperature.grad is not None


def test_every_query_votes_on_a_pair() -> None:
    head, query = make(), torch.randn(3, 2, WIDTH).double()
    assert head.itm_head is not None
    votes = [head.itm_head(query[:, m]) for m in range(2)]
    torch.testing.assert_close(head.match_logits(query), (votes[0] + votes[1]) / 2)


@pytest.mark.parametrize(
    ("off", "left"),
    [
        ("contrastive", {"itm_head"}),
        ("matching", {"image_proj", "text_proj", "temperature"}),
    ],
)
def test_objective_that_is_off_has_no_parameters(off: str, left: set[str]) -> None:
    head = make(**{off: False})
    assert {name.split(".")[0] for name in head.state_dict()} == left
    head.clamp_temperature_()


@pytest.mark.parametrize(
    ("value", "clamped"), [(1e-6, 0.001), (0.2, 0.2), (9.0, 0.5), (-1.0, 0.001)]
)
def test_temperature_stays_within_bounds(value: float, clamped: float) -> None:
    head = make()
    assert head.temperature is not None
    head.temperature.data.fill_(value)
    head.clamp_temperature_()
    torch.testing.assert_close(head.temperature.item(), clamped)


def test_initialises_after_meta() -> None:
    with torch.device("meta"):
        head = AlignmentHeadConfig(width=WIDTH, embed_dim=EMBED).build()
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        parameter.data.fill_(torch.nan)
    head.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"init_temperature": 0.9}, "init_temperature is 0.9; it must lie between"),
        ({"min_temperature": 0.0}, r"min_temperature=0.0 \(above 0\)"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentHeadConfig(**{"width": WIDTH, **fields})
