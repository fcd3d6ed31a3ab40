"""The C-Abstractor: convolutions around an average pooling of the feature grid.

Honeybee (Cha et al. 2023, arXiv 2312.06742), section 3.2, by default with the sizes of its 7B
model: 3 blocks, pooling to 144 tokens, 3 blocks, then an MLP of 2 layers (SiLU). The blocks are
RegNet's bottlenecks (Radosavovic et al. 2020, arXiv 2003.13678) with SiLU, LayerNorm over the
channels, depthwise 3 x 3 convolutions and a squeeze-and-excitation of a quarter of the channels.

Shape suffixes: B batch, N feature tokens, P patches, M soft tokens, D width of the features, E
width of the soft tokens, H W rows and columns of a grid, F its channels.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.bridges.average_pool import PooledGridConfig, pool
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import POSITION_STD, PatchBridge, blank, make_mlp


@dataclass(frozen=True, kw_only=True)
class CAbstractorConfig(PooledGridConfig):
    name: ClassVar[str] = "c_abstractor"

    width: int = 1024
    """Channels of the convolutions."""
    depth: int = 3
    """Blocks before the pooling, and as many after it."""
    mlp_depth: int = 2
    """Linear layers behind the convolutions, all but the last as wide as the soft tokens."""
    input_positions: bool = True
    """Learned positions added to the features."""

    def __post_init__(self) -> None:
        require_positive_int(self, "width", "depth", "mlp_depth")
        super().__post_init__()

    def build(self) -> "CAbstractor":
        return CAbstractor(self)


class RegNetBlock(nn.Module):
    """Expand, look at the neighbours, weigh the channels, map back; residual.

    Grids have their channels last, so that maps of single cells are linear layers.
    """

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, round(in_dim / 4))
        self.expand = nn.Linear(in_dim, width, bias=False)
        self.expand_norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv_norm = nn.LayerNorm(width)
        self.squeeze = nn.Linear(width, squeezed)
        self.excite = nn.Linear(squeezed, width)
        self.back = nn.Linear(width, width, bias=False)
        self.back_norm = nn.LayerNorm(width)
        self.shortcut: nn.Sequential | None = None
        if in_dim != width:
            self.shortcut = nn.Sequential(nn.Linear(in_dim, width, bias=False), nn.LayerNorm(width))

    def forward(self, grid_BHWF: Tensor) -> Tensor:
        """Map a grid (B, H, W, in_dim) to (B, H, W, width)."""
        x_BHWF = F.silu(self.expand_norm(self.expand(grid_BHWF)))
        x_BHWF = self.conv(x_BHWF.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x_BHWF = F.silu(self.conv_norm(x_BHWF))
        mean_B11F = x_BHWF.mean(dim=(1, 2), keepdim=True)
        x_BHWF = x_BHWF * self.excite(F.silu(self.squeeze(mean_B11F))).sigmoid()
        x_BHWF = self.back_norm(self.back(x_BHWF))
        return F.silu(x_BHWF + (grid_BHWF if self.shortcut is None else self.shortcut(grid_BHWF)))


class CAbstractor(PatchBridge):
    """`before` the pooling, `after` it, and the MLP `proj`."""

    config_class = CAbstractorConfig
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = (RegNetBlock,)

    def __init__(self, config: CAbstractorConfig) -> None:
        super().__init__(config)
        self.rows_columns = config.rows_columns
        self.side = config.side
        self.num_output_tokens = config.num_output_tokens
        self.input_positions: nn.Parameter | None = None
        if config.input_positions:
            self.input_positions = nn.Parameter(torch.empty(1, config.num_patches, config.in_dim))
        widths = [config.in_dim, *[config.width] * (config.depth - 1)]
        self.before = nn.Sequential(*(RegNetBlock(width, config.width) for width in widths))
        self.after = nn.Sequential(
            *(RegNetBlock(config.width, config.width) for _ in range(config.depth))
        )
        self.proj = make_mlp(
            config.width, config.out_dim, config.out_dim, config.mlp_depth, activation=nn.SiLU
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.input_positions is not None:
            nn.init.trunc_normal_(self.input_positions, std=POSITION_STD)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid count as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        if self.input_positions is not None:
            patches_BPD = patches_BPD + self.input_positions
        grid_BHWD = blank(patches_BPD, mask_BP).unflatten(1, self.rows_columns)
        pooled_BhwF = pool(self.before(grid_BHWD), self.side)
        tokens_BME: Tensor = self.proj(self.after(pooled_BhwF).flatten(1, 2))
        return tokens_BME
