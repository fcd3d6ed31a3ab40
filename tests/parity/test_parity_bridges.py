"""Resampler, C-Abstractor and pooling against the libraries: outputs and all gradients.

Legend: B batch, N feature tokens, D features' width, M soft tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from latentmodal.bridges import (
    AveragePoolConfig,
    CAbstractorConfig,
    ResamplerConfig,
    build_bridge,
)

RESAMPLER_NAMES = {
    "0.context_layer_norm": "feature_norm",
    "0.latents_layer_norm": "latent_norm",
    "0.q_proj": "query",
    "0.k_proj": "key",
    "0.v_proj": "value",
    "0.output_proj": "out",
    "1.ln": "mlp_norm",
    "1.fc": "up",
    "1.c_proj": "down",
}
"""Theirs, within `blocks.N`, and ours, within `layers.N`."""

REGNET_NAMES = {
    "conv1.conv": "expand",
    "conv1.bn": "expand_norm",
    "conv2.conv": "conv",
    "conv2.bn": "conv_norm",
    "se.fc1": "squeeze",
    "se.fc2": "excite",
    "conv3.conv": "back",
    "conv3.bn": "back_norm",
    "downsample.conv": "shortcut.0",
    "downsample.bn": "shortcut.1",
}
"""Theirs, within `bN` of a stage, and ours, within a block."""


@pytest.fixture
def features_BND() -> Tensor:
    return torch.randn(2, 37, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def noisy(module: nn.Module) -> nn.Module:
    """Double precision, and norms away from ones and zeros, so that none could be left out."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of one block of theirs under our names; a 1 x 1 convolution is a linear map."""
    moved = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        flat = tensor.ndim == 4 and names[module] != "conv"
        moved[f"{names[module]}.{kind}"] = tensor.flatten(1) if flat else tensor
    return moved


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {name: grad for name, grad in found.items() if grad is not None}


def run_both(ours: nn.Module, theirs: nn.Module, features_BND: Tensor) -> None:
    """Compare outputs and the gradients of the features, and leave those of the weights."""
    own_BND, their_BND = (features_BND.clone().requires_grad_() for _ in range(2))
    own_BME, their_BME = ours(own_BND), theirs(their_BND)
    torch.testing.assert_close(own_BME, their_BME)
    weights_ME = torch.randn_like(own_BME[0])
    (own_BME * weights_ME).sum().backward()
    (their_BME * weights_ME).sum().backward()
    torch.testing.assert_close(own_BND.grad, their_BND.grad)


def resampler_state(theirs: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    state = {"latents": theirs["latents"].unsqueeze(0)}
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = theirs[f"layer_norm.{kind}"]
    for index in range(layers):
        prefix = f"blocks.{index}."
        block = {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}
        moved = renamed(block, RESAMPLER_NAMES)
        state |= {f"layers.{index}.{name}": tensor for name, tensor in moved.items()}
    return state


def test_resampler_is_that_of_idefics(features_BND: Tensor) -> None:
    config = IdeficsConfig(vision_config={"embed_dim": 12}, perceiver_config={})
    theirs = IdeficsPerceiverResampler(config, 12, depth=2, n_heads=3, head_dim=5, n_latents=4)
    noisy(theirs)
    fields = ResamplerConfig(
        in_dim=12, out_dim=12, num_input_tokens=37, num_queries=4, layers=2, heads=3, head_dim=5
    )
    ours = fields.build().double()
    ours.proj = nn.Identity()  # theirs has no map behind it
    ours.load_state_dict(resampler_state(theirs.state_dict(), 2))
    run_both(ours, theirs, features_BND)
    torch.testing.assert_close(gradients(ours), resampler_state(gradients(theirs), 2))


class Honeybee(nn.Module):
    """The C-Abstractor as its paper puts it together, out of timm's stages."""

    def __init__(self, in_dim: int, width: int, out_dim: int, depth: int, side: int) -> None:
        super().__init__()
        regnet = pytest.importorskip("timm.models.regnet")
        layers = pytest.importorskip("timm.layers")
        stage = partial(
            regnet.RegStage,
            stride=1,
            dilation=1,
            act_layer=nn.SiLU,
            norm_layer=layers.LayerNorm2d,
        )
        self.positions = nn.Parameter(torch.zeros(1, 36, in_dim))
        self.before = stage(depth, in_dim, width)
        self.sampler = nn.AdaptiveAvgPool2d((side, side))
        self.after = stage(depth, width, width)
        self.readout = nn.Sequential(
            nn.Linear(width, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim)
        )

    def forward(self, features_BND: Tensor) -> Tensor:
        patches_BPD = features_BND[:, 1:] + self.positions
        grid_BDHW = patches_BPD.transpose(1, 2).unflatten(2, (6, 6))
        pooled_BFhw = self.after(self.sampler(self.before(grid_BDHW)))
        tokens_BME: Tensor = self.readout(pooled_BFhw.flatten(2).transpose(1, 2))
        return tokens_BME


def c_abstractor_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {"input_positions": theirs["positions"]}
    for name, tensor in theirs.items():
        part, _, rest = name.partition(".")
        if part == "readout":
            state[f"proj.{rest}"] = tensor
        elif part in ("before", "after"):
            block, _, rest = rest.partition(".")
            ((own, moved),) = renamed({rest: tensor}, REGNET_NAMES).items()
            state[f"{part}.{int(block[1:]) - 1}.{own}"] = moved
    return state


@pytest.mark.parametrize("side", [3, 4])  # windows side by side, windows that overlap
@pytest.mark.parametrize("width", [12, 20])  # without and with a map beside the first block
def test_c_abstractor_is_that_of_honeybee(features_BND: Tensor, side: int, width: int) -> None:
    theirs = noisy(Honeybee(12, width, 7, depth=2, side=side))
    ours = CAbstractorConfig(
        in_dim=12, out_dim=7, num_input_tokens=37, skip_tokens=1, width=width, depth=2,
        num_output_tokens=side**2,
    ).build().double()  # fmt: skip
    ours.load_state_dict(c_abstractor_state(theirs.state_dict()))
    run_both(ours, theirs, features_BND)
    torch.testing.assert_close(gradients(ours), c_abstractor_state(gradients(theirs)))


def test_c_abstractor_has_the_published_size() -> None:
    """Honeybee-C-7B-M144: CLIP ViT-L/14 at 224 pixels into Vicuna-7B."""
    with torch.device("meta"):
        ours = CAbstractorConfig(in_dim=1024, out_dim=4096, num_input_tokens=256).build()
        theirs = Honeybee(1024, 1024, 4096, depth=3, side=12)
    own, their = (
        sum(p.numel() for name, p in module.named_parameters() if "positions" not in name)
        for module in (ours, theirs)
    )
    assert own == their


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (12, 3)])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_pooling_is_that_of_pytorch(features_BND: Tensor, grid: tuple[int, int], side: int) -> None:
    ours = AveragePoolConfig(
        in_dim=12, out_dim=12, num_input_tokens=37, skip_tokens=1, grid=grid,
        num_output_tokens=side**2,
    ).build()  # fmt: skip

    class Theirs(nn.Module):
        def forward(self, x_BND: Tensor) -> Tensor:
            grid_BDHW = x_BND[:, 1:].transpose(1, 2).unflatten(2, grid)
            return F.adaptive_avg_pool2d(grid_BDHW, side).flatten(2).transpose(1, 2)

    run_both(ours, Theirs(), features_BND)


def test_pooling_averages_what_is_valid() -> None:
    bridge = build_bridge(
        "average_pool", in_dim=1, out_dim=1, num_input_tokens=16, num_output_tokens=4
    )
    features_BND = torch.arange(16.0).view(1, 16, 1)
    mask_BN = torch.ones(1, 16, dtype=torch.bool)
    mask_BN[0, [0, 1, 4, 5]] = False  # the first window
    mask_BN[0, 2] = False  # one of the second's 2, 3, 6, 7
    assert bridge(features_BND, mask_BN).flatten().tolist() == pytest.approx(
        [0.0, (3 + 6 + 7) / 3, 10.5, 12.5]
    )
