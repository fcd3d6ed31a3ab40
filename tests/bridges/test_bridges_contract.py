"""What every bridge promises, tried on each of the table: one row here per way to build it.

Legend: B batch, N feature tokens, D features' width, M soft tokens, E their width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from latentmodal.bridges import BRIDGES, Bridge, BridgeConfig, load
from latentmodal.bridges.component import make_config

FEATURES = 37
"""36 patches behind a class token."""
WIDTH = 8


class Row(NamedTuple):
    fields: dict[str, Any]
    tokens: int
    """M."""
    units: dict[str, int] = {}  # noqa: RUF012 - nobody writes to it
    """Sharding units by the name of their class."""


SHAPE: dict[str, Any] = {"in_dim": WIDTH, "out_dim": 12, "num_input_tokens": FEATURES}
PATCHES = SHAPE | {"skip_tokens": 1}
KEPT = PATCHES | {"out_dim": WIDTH}
QFORMER: dict[str, Any] = {
    "in_dim": WIDTH, "width": 16, "layers": 2, "heads": 2, "mlp_dim": 16, "num_queries": 3,
    "dropout": 0.0,
}  # fmt: skip
RESAMPLER = {"num_queries": 3, "layers": 2, "heads": 2, "head_dim": 4}
CONVOLUTIONS = {"num_output_tokens": 4, "width": 10, "depth": 2}
QFORMER_UNITS = {"QFormerLayer": 2, "FeatureKeyValue": 1}

ROWS: dict[str, Row] = {
    "linear": Row(SHAPE, 37),
    "mlp": Row(SHAPE, 37),
    "mlp: three layers, no class token": Row(PATCHES | {"depth": 3, "hidden_dim": 10}, 36),
    "token_merge": Row(PATCHES | {"input_norm": True}, 9),
    "pixel_shuffle": Row(PATCHES, 9),
    "pixel_shuffle: no square": Row(PATCHES | {"grid": [4, 9], "factor": 1, "depth": 2}, 36),
    "average_pool": Row(KEPT | {"num_output_tokens": 9}, 9),
    "average_pool: windows that overlap": Row(KEPT | {"num_output_tokens": 16}, 16),
    "average_pool: no square": Row(KEPT | {"num_output_tokens": 4, "grid": [3, 12]}, 4),
    "qformer": Row(QFORMER, 3, QFORMER_UNITS),
    "qformer: projected, with positions": Row(
        QFORMER | {"out_dim": 12, "num_input_positions": FEATURES}, 3, QFORMER_UNITS
    ),
    "resampler": Row(SHAPE | RESAMPLER, 3, {"ResamplerLayer": 2}),
    "resampler: positions, no class token": Row(
        PATCHES | RESAMPLER | {"input_positions": True, "mlp_dim": 6}, 3, {"ResamplerLayer": 2}
    ),
    "c_abstractor": Row(PATCHES | CONVOLUTIONS, 4, {"RegNetBlock": 4}),
    "c_abstractor: of one width, no positions": Row(
        PATCHES | CONVOLUTIONS | {"width": WIDTH, "input_positions": False, "depth": 1},
        4,
        {"RegNetBlock": 2},
    ),
    "identity": Row(KEPT, 36),
    "chain": Row(
        {
            "parts": [
                {"bridge": "qformer"} | QFORMER,
                {"bridge": "linear", "in_dim": 16, "out_dim": 12, "num_input_tokens": 3},
            ]
        },
        3,
        QFORMER_UNITS,
    ),
    "chain: pooled before the map": Row(
        {
            "parts": [
                {"bridge": "average_pool", "num_output_tokens": 9} | KEPT,
                {"bridge": "mlp", "in_dim": WIDTH, "out_dim": 12, "num_input_tokens": 9},
            ]
        },
        9,
    ),
}  # fmt: skip


def config_of(case: str) -> BridgeConfig:
    config = make_config(case.split(":")[0], ROWS[case].fields, BRIDGES)
    assert isinstance(config, BridgeConfig)
    return config


@pytest.fixture
def features_BND() -> Tensor:
    return torch.randn(2, FEATURES, WIDTH, generator=torch.Generator().manual_seed(0))


def test_every_bridge_has_a_row() -> None:
    assert {case.split(":")[0] for case in ROWS} == set(BRIDGES)


@pytest.mark.parametrize("case", ROWS)
class TestEveryBridge:
    def test_promises_its_shape(self, case: str, features_BND: Tensor) -> None:
        config = config_of(case)
        bridge = config.build()
        assert isinstance(bridge, Bridge)
        assert bridge.config == config
        assert bridge.in_dim == WIDTH
        assert config.input_tokens in (None, FEATURES)
        assert bridge.num_output_tokens == ROWS[case].tokens
        assert bridge(features_BND).shape == (2, bridge.num_output_tokens, bridge.out_dim)

    def test_everything_learns(self, case: str, features_BND: Tensor) -> None:
        """Every weight gets a gradient, and so does every patch."""
        torch.manual_seed(0)
        bridge = config_of(case).build()
        features_BND.requires_grad_()
        (bridge(features_BND) * torch.randn(bridge.out_dim)).sum().backward()
        for name, weight in bridge.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
            # A softmax does not change with the bias of its keys.
            assert weight.grad.abs().sum() > 0 or name.endswith("key.bias"), name
        assert features_BND.grad is not None
        assert (features_BND.grad[:, 1:].abs().sum(-1) > 0).all()

    def test_comes_back_bit_by_bit(self, case: str, features_BND: Tensor, tmp_path: Path) -> None:
        bridge = config_of(case).build().eval()
        bridge.save_pretrained(tmp_path)
        loaded = load(tmp_path).eval()
        assert loaded.config == bridge.config
        assert loaded.state_dict().keys() == bridge.state_dict().keys()
        for name, tensor in bridge.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(loaded(features_BND), bridge(features_BND))

    def test_is_built_without_data_and_filled(self, case: str, features_BND: Tensor) -> None:
        with torch.device("meta"):
            bridge = config_of(case).build()
        assert all(tensor.is_meta for tensor in bridge.state_dict().values())
        bridge.to_empty(device="cpu")
        for tensor in bridge.state_dict().values():  # what is left out cannot pass by chance
            tensor.fill_(torch.nan)
        bridge.reset_parameters()
        for name, tensor in bridge.state_dict().items():
            assert tensor.isfinite().all(), name
        assert bridge(features_BND).isfinite().all()

    def test_is_filled_as_it_is_built(self, case: str) -> None:
        """The same spread of every weight, whichever way it was made."""
        torch.manual_seed(0)
        built = config_of(case).build()
        again = config_of(case).build()
        again.reset_parameters()
        for (name, one), other in zip(built.named_parameters(), again.parameters(), strict=True):
            if one.numel() > 30:
                torch.testing.assert_close(one.std(), other.std(), rtol=0.6, atol=0, msg=name)

    def test_shards_into_its_own_modules(self, case: str) -> None:
        bridge = config_of(case).build()
        found: dict[str, int] = {}
        for unit in bridge.fsdp_units:
            modules = [module for module in bridge.modules() if type(module) is unit]
            assert modules and bridge not in modules
            found[unit.__name__] = len(modules)
        assert found == ROWS[case].units

    def test_compiles_as_one_graph(self, case: str, features_BND: Tensor) -> None:
        """Outputs and gradients: first rows with a mask, further ones (after a colon) without."""
        torch.compiler.reset()
        bridge = config_of(case).build()
        compiled = torch.compile(bridge, fullgraph=True, backend="aot_eager")
        mask_BN = torch.arange(FEATURES).expand(2, -1) < 30 if ":" not in case else None
        found = []
        for run in (bridge, compiled):
            own_BND = features_BND.clone().requires_grad_()
            bridge.zero_grad()
            said_BME = run(own_BND, mask_BN)
            said_BME.square().sum().backward()
            found.append([said_BME, own_BND.grad, *(p.grad for p in bridge.parameters())])
        torch.testing.assert_close(found[1], found[0])

    def test_rows_do_not_mix(self, case: str, features_BND: Tensor) -> None:
        bridge = config_of(case).build().eval()
        torch.testing.assert_close(bridge(features_BND.flip(0)), bridge(features_BND).flip(0))

    def test_runs_in_bfloat16(self, case: str, features_BND: Tensor) -> None:
        bridge = config_of(case).build().eval().to(torch.bfloat16)
        said_BME = bridge(features_BND.bfloat16())
        assert said_BME.dtype == torch.bfloat16 and said_BME.isfinite().all()

    @pytest.mark.parametrize("holes", [[35, 36], [3, 17], [*range(1, 37)]])
    def test_masked_features_never_get_through(
        self, case: str, holes: list[int], features_BND: Tensor
    ) -> None:
        """At the end, in the middle, and where a row has no valid patch at all."""
        bridge = config_of(case).build().eval()
        mask_BN = torch.ones(2, FEATURES, dtype=torch.bool)
        torch.testing.assert_close(bridge(features_BND, mask_BN), bridge(features_BND))
        mask_BN[1, holes] = False
        said_BME = bridge(features_BND, mask_BN)
        spoiled_BND = features_BND.masked_fill(~mask_BN.unsqueeze(-1), 1e4)
        torch.testing.assert_close(bridge(spoiled_BND, mask_BN), said_BME)
        assert said_BME.isfinite().all()
        torch.testing.assert_close(said_BME[0], bridge(features_BND)[0])
        assert not torch.allclose(said_BME[1], bridge(features_BND)[1])

    def test_other_widths_are_one_line(self, case: str, features_BND: Tensor) -> None:
        with pytest.raises(ValueError, match="in_dim") as error:
            config_of(case).build()(features_BND[..., :5])
        assert "\n" not in str(error.value)

    def test_a_class_token_that_is_skipped_is_never_looked_at(
        self, case: str, features_BND: Tensor
    ) -> None:
        config = config_of(case)
        bridge = config.build().eval()
        before_BME = bridge(features_BND)
        features_BND[:, 0] = 100.0
        first = config.parts[0] if hasattr(config, "parts") else config
        same = torch.equal(bridge(features_BND), before_BME)
        assert same == (getattr(first, "skip_tokens", 0) == 1)


RELEASED: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"in_dim", "out_dim", "num_input_tokens"}, {"proj.weight", "proj.bias"}),
    "mlp": (
        {"in_dim", "out_dim", "num_input_tokens", "depth", "hidden_dim", "skip_tokens"},
        {"proj.0.weight", "proj.0.bias", "proj.2.weight", "proj.2.bias"},
    ),
    "token_merge": (
        {"in_dim", "out_dim", "num_input_tokens", "merge", "skip_tokens", "input_norm"},
        {"input_norm.weight", "input_norm.bias", "proj.weight", "proj.bias"},
    ),
    "pixel_shuffle": (
        {
            "in_dim", "out_dim", "num_input_tokens", "factor", "grid", "skip_tokens", "depth",
            "hidden_dim",
        },
        {"proj.0.weight", "proj.0.bias"},
    ),
    "average_pool": (
        {"in_dim", "out_dim", "num_input_tokens", "skip_tokens", "grid", "num_output_tokens"},
        set(),
    ),
    "identity": ({"in_dim", "out_dim", "num_input_tokens", "skip_tokens"}, set()),
}  # fmt: skip


@pytest.mark.parametrize("case", RELEASED)
def test_names_in_folders_stay(case: str, tmp_path: Path) -> None:
    """Fields and weights under other names would leave folders of earlier versions unreadable."""
    bridge = config_of(case).build()
    bridge.save_pretrained(tmp_path)
    fields, weights = RELEASED[case]
    assert json.loads((tmp_path / "config.json").read_text()).keys() == fields | {
        "format_version",
        "bridge",
    }
    assert bridge.state_dict().keys() == weights
