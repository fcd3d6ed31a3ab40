"""What bridges share that read a fixed number of feature tokens, some of them as a grid.

Shape suffixes: B batch, N feature tokens, P patches (feature tokens less the leading ones), D width
of the features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import require_positive_int

POSITION_STD = 0.02
"""Of learned positions when they start."""


@dataclass(frozen=True, kw_only=True)
class PatchConfig(BridgeConfig):
    """Config of a `PatchBridge`."""

    in_dim: int
    out_dim: int
    num_input_tokens: int
    skip_tokens: int = 0
    """Leading tokens to leave out, such as a CLS token."""

    def __post_init__(self) -> None:
        require_positive_int(self, "in_dim", "out_dim", "num_input_tokens")
        if type(self.skip_tokens) is not int or self.skip_tokens < 0:
            raise ValueError(self._skip_message())
        if self.output_width == "kept" and self.in_dim != self.out_dim:
            raise ValueError(
                f"bridge {self.name!r} writes tokens as wide as it reads them, but "
                f"in_dim={self.in_dim} and out_dim={self.out_dim}; chain it with one that maps"
            )
        if self.num_input_tokens > 1:  # 1 may stand for a number that is not known yet
            self.check_patches()

    def check_patches(self) -> None:
        """Raise ValueError unless the bridge can read `num_patches` tokens."""
        if self.num_patches < 1:
            raise ValueError(self._skip_message())

    def _skip_message(self) -> str:
        return (
            f"skip_tokens is {self.skip_tokens!r}; it must be a whole number from 0 to "
            f"{max(0, self.num_input_tokens - 1)}"
        )

    @property
    def input_tokens(self) -> int:
        return self.num_input_tokens

    @property
    def num_patches(self) -> int:
        return self.num_input_tokens - self.skip_tokens


@dataclass(frozen=True, kw_only=True)
class GridConfig(PatchConfig):
    """Config of a `PatchBridge` whose patches are a raster."""

    grid: tuple[int, ...] | None = None
    """Rows and columns of the features; None: a square."""

    def __post_init__(self) -> None:
        sides = self.grid
        if sides is not None and (
            len(sides) != 2 or not all(type(n) is int and n >= 1 for n in sides)
        ):
            raise ValueError(
                f"grid is {sides!r}; give rows and columns, or leave it out for a square"
            )
        super().__post_init__()

    def check_patches(self) -> None:
        super().check_patches()
        rows, columns = self.rows_columns
        if rows * columns != self.num_patches:
            raise ValueError(
                f"{self.num_patches} tokens are not a grid of {rows} x {columns}: set grid to its "
                "rows and columns, and skip_tokens to the tokens before it"
            )

    @property
    def rows_columns(self) -> tuple[int, int]:
        """As given, or a square."""
        if self.grid is None:
            return (math.isqrt(self.num_patches),) * 2
        return self.grid[0], self.grid[1]


class PatchBridge(Bridge):
    """A bridge that reads `num_input_tokens` tokens and leaves the first `skip_tokens` out."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        config.check_patches()
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim
        self.num_input_tokens = config.num_input_tokens
        self.skip_tokens = config.skip_tokens

    def patches(self, features_BND: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Patches (B, P, D) and their mask (B, P).

        Raises:
            ValueError: N or D is not what the config promised.
        """
        require_shape(features_BND, self.num_input_tokens, self.in_dim)
        mask_BP = None if mask_BN is None else mask_BN[:, self.skip_tokens :]
        return features_BND[:, self.skip_tokens :], mask_BP


def require_shape(features_BND: Tensor, num_input_tokens: int, in_dim: int) -> None:
    """Raise ValueError unless features are (batch, num_input_tokens, in_dim)."""
    if features_BND.ndim != 3 or features_BND.shape[1:] != (num_input_tokens, in_dim):
        raise ValueError(
            f"features have shape {tuple(features_BND.shape)}, this bridge reads (batch, "
            f"num_input_tokens={num_input_tokens}, in_dim={in_dim}); set both fields to what the "
            "encoder gives"
        )


def sincos_grid(num_tokens: int, width: int) -> Tensor:
    """Positions (N, D) of a square raster: sine and cosine of its row and of its column.

    Frequencies rise from half a turn over the whole side to half a turn over two tokens, so that
    even few tokens differ clearly; Vaswani et al. 2017 (arXiv 1706.03762), in two dimensions.

    Raises:
        ValueError: the tokens are no square, or the width does not divide by 4.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens or width % 4:
        raise ValueError(
            f"sincos positions of {num_tokens} tokens of width {width}: it wants a square "
            "of tokens (num_input_positions), and a width that divides by 4"
        )
    # S places along a side, E = D / 2.
    lowest, highest = math.log(1 / side), math.log(0.5)
    steps = torch.linspace(lowest, highest, width // 4, device="cpu").exp() * math.pi
    angles = torch.arange(side, device="cpu")[:, None] * steps
    wave_SE = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows_SSE = wave_SE[:, None].expand(side, side, -1)
    return torch.cat([rows_SSE, rows_SSE.transpose(0, 1)], dim=-1).flatten(0, 1)


def blank(tokens_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Tokens with zeros where the mask marks them invalid."""
    if mask_BN is None:
        return tokens_BND
    return tokens_BND.masked_fill(~mask_BN.unsqueeze(-1), 0)


def make_mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    depth: int,
    activation: Callable[[], nn.Module] = nn.GELU,
) -> nn.Sequential:
    """``depth`` linear layers with an activation between them."""
    widths = [in_dim, *[hidden_dim] * (depth - 1), out_dim]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])
