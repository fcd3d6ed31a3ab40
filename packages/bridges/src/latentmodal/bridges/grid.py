"""What bridges share that read a fixed number of feature tokens, some of them as a grid.

Shape suffixes: B batch, N feature tokens, D width of the features.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def require_shape(features_BND: Tensor, num_input_tokens: int, in_dim: int) -> None:
    """Raise ValueError unless features are (batch, num_input_tokens, in_dim)."""
    if features_BND.ndim != 3 or features_BND.shape[1:] != (num_input_tokens, in_dim):
        raise ValueError(
            f"features have shape {tuple(features_BND.shape)}, this bridge reads (batch, "
            f"num_input_tokens={num_input_tokens}, in_dim={in_dim}); set both fields to what the "
            "encoder gives"
        )


def blank(features_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Features with zeros where the mask marks them invalid, for bridges that join neighbours."""
    if mask_BN is None:
        return features_BND
    return features_BND.masked_fill(~mask_BN.unsqueeze(-1), 0)


def check_skip(skip_tokens: int, num_input_tokens: int) -> None:
    """Raise ValueError unless some tokens are left.

    A count of 1 stands for one that is not known yet.
    """
    whole = type(skip_tokens) is int and skip_tokens >= 0
    if not whole or (num_input_tokens > 1 and skip_tokens >= num_input_tokens):
        raise ValueError(
            f"skip_tokens is {skip_tokens!r}; it must be a whole number from 0 to "
            f"{max(0, num_input_tokens - 1)}"
        )


def grid_of(num_tokens: int, grid: Sequence[int] | None) -> tuple[int, int]:
    """Rows and columns of ``num_tokens`` raster tokens: as given, or a square.

    Raises:
        ValueError: the tokens do not fill the grid.
    """
    rows, columns = (math.isqrt(num_tokens),) * 2 if grid is None else (grid[0], grid[1])
    if rows * columns != num_tokens:
        raise ValueError(
            f"{num_tokens} tokens are not a grid of {rows} x {columns}: set grid to its rows and "
            "columns, and skip_tokens to the tokens before it"
        )
    return rows, columns


def check_grid(grid: Sequence[int] | None) -> None:
    """Raise ValueError unless ``grid`` is None or two whole numbers of at least 1."""
    good = grid is None or (len(grid) == 2 and all(type(n) is int and n >= 1 for n in grid))
    if not good:
        raise ValueError(f"grid is {grid!r}; give rows and columns, or leave it out for a square")


def make_mlp(in_dim: int, hidden_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers with GELU between them."""
    widths = [in_dim, *[hidden_dim] * (depth - 1), out_dim]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def reset(module: nn.Module) -> None:
    """Initialise every submodule in place as PyTorch does."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.LayerNorm):
            child.reset_parameters()
