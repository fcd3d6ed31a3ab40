"""Projections and chains: shapes, gradients, saving, masks, and what they compute.

Legend: B batch, N feature tokens, D features' width, E soft tokens' width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from latentmodal.bridges import (
    BRIDGES,
    Bridge,
    BridgeConfig,
    ChainConfig,
    LinearProjectionConfig,
    MlpProjectionConfig,
    PixelShuffleConfig,
    QFormerConfig,
    TokenMergeConfig,
    build_bridge,
    load,
)

SMALL: dict[str, Any] = {"in_dim": 8, "out_dim": 12, "num_input_tokens": 37}
QFORMER = QFormerConfig(
    in_dim=8, width=16, layers=2, heads=2, mlp_dim=16, num_queries=3, dropout=0.0
)
CASES: dict[str, BridgeConfig] = {
    "linear": LinearProjectionConfig(**SMALL),
    "mlp": MlpProjectionConfig(**SMALL),
    "mlp without CLS": MlpProjectionConfig(**SMALL, depth=3, hidden_dim=10, skip_tokens=1),
    "token_merge": TokenMergeConfig(**SMALL, skip_tokens=1, input_norm=True),
    "pixel_shuffle": PixelShuffleConfig(**SMALL, skip_tokens=1),
    "pixel_shuffle of a grid": PixelShuffleConfig(
        **SMALL, skip_tokens=1, grid=(4, 9), factor=1, depth=2
    ),
    "qformer": QFORMER,
    "chain": ChainConfig(
        parts=(QFORMER, LinearProjectionConfig(in_dim=16, out_dim=12, num_input_tokens=3))
    ),
}
TOKENS = {"linear": 37, "mlp": 37, "mlp without CLS": 36, "token_merge": 9, "pixel_shuffle": 9,
          "pixel_shuffle of a grid": 36, "qformer": 3, "chain": 3}  # fmt: skip


@pytest.fixture
def features_BND() -> Tensor:
    return torch.randn(2, 37, 8, generator=torch.Generator().manual_seed(0))


def test_every_bridge_is_tried() -> None:
    assert {config.name for config in CASES.values()} == set(BRIDGES)


@pytest.mark.parametrize("case", CASES)
class TestEveryBridge:
    def test_promises_its_shape(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build()
        assert isinstance(bridge, Bridge)
        assert all(isinstance(unit, type) for unit in bridge.fsdp_units)
        assert bridge.num_output_tokens == TOKENS[case]
        assert bridge(features_BND).shape == (2, bridge.num_output_tokens, bridge.out_dim)

    def test_every_weight_learns(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build()
        (bridge(features_BND) * torch.randn(bridge.out_dim)).sum().backward()
        for name, weight in bridge.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            # A softmax does not change with the bias of its keys.
            assert weight.grad.abs().sum() > 0 or name.endswith("key.bias"), name

    def test_comes_back_from_a_folder(
        self, case: str, features_BND: Tensor, tmp_path: Path
    ) -> None:
        bridge = CASES[case].build().eval()
        bridge.save_pretrained(tmp_path)
        loaded = load(tmp_path).eval()
        assert loaded.config == CASES[case]
        assert torch.equal(loaded(features_BND), bridge(features_BND))

    def test_is_built_without_data_and_filled(self, case: str, features_BND: Tensor) -> None:
        with torch.device("meta"):
            bridge: Any = CASES[case].build()
        bridge.to_empty(device="cpu")
        bridge.reset_parameters()
        assert bridge(features_BND).isfinite().all()

    def test_compiles_as_one_graph(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build().eval()
        compiled = torch.compile(bridge, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(features_BND), bridge(features_BND))
        mask_BN = torch.arange(37).expand(2, 37) < 30
        torch.testing.assert_close(compiled(features_BND, mask_BN), bridge(features_BND, mask_BN))

    def test_rows_do_not_mix(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build().eval()
        torch.testing.assert_close(bridge(features_BND.flip(0)), bridge(features_BND).flip(0))

    def test_runs_in_bfloat16(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build().eval().to(torch.bfloat16)
        said_BME = bridge(features_BND.bfloat16())
        assert said_BME.dtype == torch.bfloat16 and said_BME.isfinite().all()

    def test_padding_never_gets_through(self, case: str, features_BND: Tensor) -> None:
        bridge = CASES[case].build().eval()
        mask_BN = torch.ones(2, 37, dtype=torch.bool)
        torch.testing.assert_close(bridge(features_BND, mask_BN), bridge(features_BND))
        mask_BN[1, 30:] = False
        spoiled_BND = features_BND.masked_fill(~mask_BN.unsqueeze(-1), 1e4)
        torch.testing.assert_close(bridge(spoiled_BND, mask_BN), bridge(features_BND, mask_BN))

    def test_other_widths_are_one_line(self, case: str, features_BND: Tensor) -> None:
        with pytest.raises(ValueError, match="in_dim"):
            CASES[case].build()(features_BND[..., :5])


def test_a_chain_is_its_parts_in_turn(features_BND: Tensor) -> None:
    chain: Any = CASES["chain"].build().eval()
    torch.testing.assert_close(
        chain(features_BND), chain.parts[1].proj(chain.parts[0](features_BND))
    )


def test_a_chain_that_does_not_fit_is_one_line() -> None:
    parts = (QFORMER, LinearProjectionConfig(in_dim=8, out_dim=12, num_input_tokens=3))
    with pytest.raises(ValueError, match=r"parts\[0\] writes tokens of width 16"):
        ChainConfig(parts=parts).build()
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
    ],
)
def test_bad_shapes_are_one_line(fields: dict[str, Any], message: str) -> None:
    name = fields.pop("bridge")
    with pytest.raises(ValueError, match=message):
        build_bridge(name, in_dim=8, out_dim=4, num_input_tokens=36, **fields)
