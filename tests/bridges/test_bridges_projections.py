"""What projections, poolings and chains compute, and what they refuse.

Legend: B batch, N feature tokens, D features' width, E soft tokens' width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from latentmodal.bridges import (
    BridgeConfig,
    ChainConfig,
    LinearProjectionConfig,
    PixelShuffleConfig,
    QFormerConfig,
    TokenMergeConfig,
    build_bridge,
)

QFORMER = QFormerConfig(
    in_dim=8, width=16, layers=2, heads=2, mlp_dim=16, num_queries=3, dropout=0.0
)


@pytest.fixture
def features_BND() -> Tensor:
    return torch.randn(2, 37, 8, generator=torch.Generator().manual_seed(0))


def test_a_chain_is_its_parts_in_turn(features_BND: Tensor) -> None:
    linear = LinearProjectionConfig(in_dim=16, out_dim=12, num_input_tokens=3)
    chain: Any = ChainConfig(parts=(QFORMER, linear)).build().eval()
    torch.testing.assert_close(
        chain(features_BND), chain.parts[1].proj(chain.parts[0](features_BND))
    )


def test_a_chain_that_does_not_fit_is_one_line() -> None:
    parts = (QFORMER, LinearProjectionConfig(in_dim=8, out_dim=12, num_input_tokens=3))
    with pytest.raises(ValueError, match=r"parts\[0\] writes tokens of width 16"):
        ChainConfig(parts=parts).build()
    positioned = replace(QFORMER, in_dim=16, num_input_positions=4)
    with pytest.raises(ValueError, match=r"parts\[0\] writes 3 tokens, parts\[1\] reads 4"):
        ChainConfig(parts=(QFORMER, positioned)).build()
    with pytest.raises(ValueError, match="two or more"):
        ChainConfig(parts=(QFORMER,))
    with pytest.raises(ValueError, match="did you mean 'out_dim'"):
        build_bridge("chain", parts=[{"bridge": "linear", "out_dims": 3}, {"bridge": "linear"}])


def test_merging_joins_a_strip_of_the_raster() -> None:
    bridge = TokenMergeConfig(in_dim=2, out_dim=8, num_input_tokens=9, skip_tokens=1).build()
    bridge.proj.weight.data = torch.eye(8)  # type: ignore[union-attr]
    bridge.proj.bias.data.zero_()  # type: ignore[union-attr]
    features_BND = torch.arange(18.0).view(1, 9, 2)
    assert bridge(features_BND).tolist() == [[[*range(2, 10)], [*range(10, 18)]]]


def test_shuffling_joins_as_in_idefics3(features_BND: Tensor) -> None:
    """Against transformers, outputs and gradients; blocks stand in another order inside."""
    config = Idefics3Config(
        scale_factor=2,
        vision_config={"hidden_size": 8},
        text_config={"model_type": "llama", "hidden_size": 12, "num_attention_heads": 2},
    )
    peer = Idefics3Connector(config)
    ours = PixelShuffleConfig(in_dim=8, out_dim=12, num_input_tokens=36).build()
    torch.nn.init.zeros_(ours.proj[0].bias)  # type: ignore[index,union-attr]
    ours.proj[0].weight.data = peer.modality_projection.proj.weight.data.clone()  # type: ignore[index,union-attr]
    own_BND = features_BND[:, 1:].clone().requires_grad_()
    their_BND = own_BND.detach().clone().requires_grad_()
    own_BME, their_BME = ours(own_BND), peer(their_BND)
    torch.testing.assert_close(own_BME, their_BME)
    own_BME.square().sum().backward()
    their_BME.square().sum().backward()
    torch.testing.assert_close(own_BND.grad, their_BND.grad)


@pytest.mark.parametrize(
    ("config", "count", "tokens"),
    [
        (LinearProjectionConfig(in_dim=768, out_dim=4096, num_input_tokens=32), 3_149_824, 32),
        (LinearProjectionConfig(in_dim=768, out_dim=5120, num_input_tokens=32), 3_937_280, 32),
        (
            TokenMergeConfig(in_dim=1408, out_dim=4096, num_input_tokens=257, skip_tokens=1),
            23_072_768,
            64,
        ),
    ],
)
def test_sizes_of_the_released_projections(config: BridgeConfig, count: int, tokens: int) -> None:
    with torch.device("meta"):
        bridge = config.build()
    assert sum(p.numel() for p in bridge.parameters()) == count
    assert bridge.num_output_tokens == tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bridge": "token_merge", "merge": 5}, "does not divide the 36 tokens"),
        ({"bridge": "pixel_shuffle", "factor": 4}, "does not divide the grid of 6 x 6"),
        ({"bridge": "pixel_shuffle", "grid": [5, 7]}, "not a grid of 5 x 7"),
        ({"bridge": "pixel_shuffle", "grid": [6]}, "give rows and columns"),
        ({"bridge": "mlp", "skip_tokens": 36}, "from 0 to 35"),
        ({"bridge": "token_merge", "skip_tokens": 1.5}, "a whole number"),
        ({"bridge": "pixel_shuffle", "skip_tokens": -1}, "from 0 to 35"),
        ({"bridge": "mlp", "depth": 0}, "depth is 0"),
        ({"bridge": "average_pool"}, "in_dim=8 and out_dim=4; chain it"),
        ({"bridge": "identity"}, "in_dim=8 and out_dim=4; chain it"),
        ({"bridge": "average_pool", "num_output_tokens": 5}, "a square such as 4 or 9"),
        ({"bridge": "c_abstractor"}, "num_output_tokens=144 is a finer grid than the 6 x 6"),
        ({"bridge": "c_abstractor", "num_output_tokens": 9, "grid": [2, 18]}, "give at most 4"),
        ({"bridge": "c_abstractor", "num_output_tokens": 9, "skip_tokens": 1}, "not a grid"),
        ({"bridge": "c_abstractor", "depth": 0}, "depth is 0"),
        ({"bridge": "resampler", "heads": 0}, "heads is 0"),
        ({"bridge": "resampler", "mlp_dim": 0}, "mlp_dim is 0"),
    ],
)
def test_bad_shapes_are_one_line(fields: dict[str, Any], message: str) -> None:
    name = fields.pop("bridge")
    with pytest.raises(ValueError, match=message):
        build_bridge(name, in_dim=8, out_dim=4, num_input_tokens=36, **fields)
