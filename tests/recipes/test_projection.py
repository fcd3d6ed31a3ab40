"""The last part of a bridge from a run, a bridge's folder, or a released MiniGPT-4 file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentmodal.bridges import (
    Bridge,
    ChainConfig,
    LinearProjectionConfig,
    MlpProjectionConfig,
    QFormerConfig,
    TokenMergeConfig,
)
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.systems.projection import ProjectionConfig

QFORMER = QFormerConfig(in_dim=6, width=8, layers=1, heads=2, mlp_dim=8, num_queries=3)


def chain(out_dim: int = 12) -> Bridge:
    linear = LinearProjectionConfig(in_dim=8, out_dim=out_dim, num_input_tokens=3)
    return ChainConfig(parts=(QFORMER, linear)).build()


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """As MiniGPT-4 saves: more than the projection, in a pickle of plain tensors."""
    model = {
        "llama_proj.weight": torch.randn(12, 8),
        "llama_proj.bias": torch.randn(12),
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    path = tmp_path / "pretrained_minigpt4.pth"
    torch.save({"model": model, "optimizer": {}, "config": {"a": 1}, "epoch": 3}, path)
    return path


def test_a_released_file_fills_the_linear_map_alone(released: Path) -> None:
    bridge = chain()
    before = {name: tensor.clone() for name, tensor in bridge.state_dict().items()}
    ProjectionConfig(path=str(released), format="minigpt4").load_into(bridge)
    found = torch.load(released, weights_only=True)["model"]
    after = bridge.state_dict()
    assert torch.equal(after["parts.1.proj.weight"], found["llama_proj.weight"])
    assert torch.equal(after["parts.1.proj.bias"], found["llama_proj.bias"])
    for name in before:
        assert name.startswith("parts.1.") or torch.equal(before[name], after[name])


def test_without_a_qformer_the_norm_stays_the_identity(released: Path) -> None:
    merge = TokenMergeConfig(in_dim=2, out_dim=12, num_input_tokens=8, input_norm=True).build()
    ProjectionConfig(path=str(released), format="minigpt4").load_into(merge)
    found = torch.load(released, weights_only=True)["model"]
    assert torch.equal(merge.state_dict()["proj.weight"], found["llama_proj.weight"])
    assert torch.equal(merge.state_dict()["input_norm.weight"], torch.ones(2))
    assert torch.equal(merge.state_dict()["input_norm.bias"], torch.zeros(2))


def test_another_width_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "13b.pth"
    weights = {"llama_proj.weight": torch.zeros(5120, 8), "llama_proj.bias": torch.zeros(5120)}
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=r"width 5120 \(a 13B Llama or Vicuna\)"):
        ProjectionConfig(path=str(path), format="minigpt4").load_into(chain(4096))
    torch.save({"model": {**weights, "llama_proj.weight": torch.zeros(5120, 32)}}, path)
    with pytest.raises(UserError, match="it reads other features"):
        ProjectionConfig(path=str(path), format="minigpt4").load_into(chain(5120))


def test_a_file_without_it_or_a_bridge_without_a_place_is_one_line(
    released: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(1)}}, other)
    with pytest.raises(UserError, match="holds no llama_proj"):
        ProjectionConfig(path=str(other), format="minigpt4").load_into(chain())
    mlp = MlpProjectionConfig(in_dim=8, out_dim=12, num_input_tokens=3).build()
    with pytest.raises(UserError, match="the last part of the bridge has 2"):
        ProjectionConfig(path=str(released), format="minigpt4").load_into(mlp)
    with pytest.raises(UserError, match="another kind of projection"):
        folder = tmp_path / "mlp"
        mlp.save_pretrained(folder)
        ProjectionConfig(path=str(folder), format="latentmodal").load_into(chain())
    with pytest.raises(UserError, match="nowhere"):
        ProjectionConfig(path=str(tmp_path / "nowhere"), format="run").load_into(chain())


def test_a_saved_bridge_gives_its_last_part(tmp_path: Path) -> None:
    saved, bridge = chain(), chain()
    saved.save_pretrained(tmp_path)
    ProjectionConfig(path=str(tmp_path), format="latentmodal").load_into(bridge)
    last = {k: v for k, v in bridge.state_dict().items() if k.startswith("parts.1.")}
    assert all(torch.equal(v, saved.state_dict()[k]) for k, v in last.items())
    first = "parts.0.queries"
    assert not torch.equal(bridge.state_dict()[first], saved.state_dict()[first])
