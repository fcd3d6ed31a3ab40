"""The feature grid averaged down to a smaller square one, its width kept.

DeCo (Yao et al. 2024, arXiv 2405.20985) leaves compressing to this and puts an MLP behind it, here
`chain` with `linear` or `mlp`; its 576 patches become 144.

Shape suffixes: B batch, N feature tokens, P patches, M soft tokens, D width of the features, H W
rows and columns of features, h w of the pooled grid.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from latentmodal.bridges.bridge import OutputWidth
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import GridConfig, PatchBridge


@dataclass(frozen=True, kw_only=True)
class PooledGridConfig(GridConfig):
    """Config of a bridge whose grid ends as a square of `num_output_tokens`."""

    num_output_tokens: int = 144

    def __post_init__(self) -> None:
        require_positive_int(self, "num_output_tokens")
        if self.side**2 != self.num_output_tokens:
            raise ValueError(
                f"num_output_tokens is {self.num_output_tokens}; it must be a square such as "
                f"{self.side**2} or {(self.side + 1) ** 2}"
            )
        super().__post_init__()

    def check_patches(self) -> None:
        super().check_patches()
        rows, columns = self.rows_columns
        if self.side > min(rows, columns):
            raise ValueError(
                f"num_output_tokens={self.num_output_tokens} is a finer grid than the {rows} x "
                f"{columns} features; give at most {min(rows, columns) ** 2}"
            )

    @property
    def side(self) -> int:
        """Rows and columns of what comes out."""
        return math.isqrt(self.num_output_tokens)


@dataclass(frozen=True, kw_only=True)
class AveragePoolConfig(PooledGridConfig):
    name: ClassVar[str] = "average_pool"
    output_width: ClassVar[OutputWidth] = "kept"

    def build(self) -> "AveragePool":
        return AveragePool(self)


class AveragePool(PatchBridge):
    """Nothing to train: chain it with a bridge that maps the width."""

    config_class = AveragePoolConfig

    def __init__(self, config: AveragePoolConfig) -> None:
        super().__init__(config)
        self.rows_columns = config.rows_columns
        self.side = config.side
        self.num_output_tokens = config.num_output_tokens

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Average features (B, N, D) to tokens (B, M, D).

        Only valid features count; a token that has none is zero.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        grid_BHWD = patches_BPD.unflatten(1, self.rows_columns)
        mask_BHW = None if mask_BP is None else mask_BP.unflatten(1, self.rows_columns)
        return pool(grid_BHWD, self.side, mask_BHW).flatten(1, 2)


def pool(grid_BHWD: Tensor, side: int, mask_BHW: Tensor | None = None) -> Tensor:
    """Adaptive average pooling of a grid (B, H, W, D) to (B, side, side, D).

    The windows are those of `torch.nn.functional.adaptive_avg_pool2d`: they overlap where `side`
    does not divide the grid. Written as matrix products, whose gradients are the same at every run;
    those of PyTorch's own pooling are summed in no fixed order on a GPU.
    """
    rows_hH, columns_wW = (_windows(side, size, grid_BHWD) for size in grid_BHWD.shape[1:3])
    if mask_BHW is None:
        count_hw1 = (rows_hH.sum(1)[:, None] * columns_wW.sum(1))[..., None]
        return _sum_windows(grid_BHWD, rows_hH, columns_wW) / count_hw1
    valid_BHW1 = mask_BHW.unsqueeze(-1)
    sum_BhwD = _sum_windows(grid_BHWD.masked_fill(~valid_BHW1, 0), rows_hH, columns_wW)
    count_Bhw1 = _sum_windows(valid_BHW1.to(grid_BHWD.dtype), rows_hH, columns_wW)
    return sum_BhwD / count_Bhw1.clamp(min=1)


def _sum_windows(grid_BHWD: Tensor, rows_hH: Tensor, columns_wW: Tensor) -> Tensor:
    sum_BhX = rows_hH @ grid_BHWD.flatten(2)
    return columns_wW @ sum_BhX.unflatten(2, grid_BHWD.shape[2:])


def _windows(count: int, size: int, like: Tensor) -> Tensor:
    """Ones where a cell (of `size`) belongs to a window (of `count`)."""
    window_h1 = torch.arange(count, device=like.device).unsqueeze(1)
    cell_H = torch.arange(size, device=like.device)
    first_h1 = window_h1 * size // count
    end_h1 = ((window_h1 + 1) * size + count - 1) // count
    return ((cell_H >= first_h1) & (cell_H < end_h1)).to(like.dtype)
