"""Square blocks of the feature grid joined into one token each, then mapped.

Space to depth, after Shi et al. 2016 (arXiv 1609.05158) read backwards; as a bridge in InternVL 1.5
(arXiv 2404.16821) and Idefics3 (arXiv 2408.12637). Within a block, features are joined row by row.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens, h w rows and columns of blocks, r s place in a block.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import (
    blank,
    check_grid,
    check_skip,
    grid_of,
    make_mlp,
    require_shape,
    reset,
)


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(BridgeConfig):
    name: ClassVar[str] = "pixel_shuffle"

    in_dim: int
    out_dim: int
    num_input_tokens: int
    factor: int = 2
    """Side of a block."""
    grid: tuple[int, ...] | None = None
    """Rows and columns of the features; None: a square."""
    skip_tokens: int = 0
    """Leading tokens to leave out, such as a CLS token."""
    depth: int = 1
    """Linear layers of the map, GELU between them."""
    hidden_dim: int | None = None
    """Width between them; None: `out_dim`."""

    def __post_init__(self) -> None:
        require_positive_int(self, "in_dim", "out_dim", "num_input_tokens", "factor", "depth")
        check_grid(self.grid)
        check_skip(self.skip_tokens, self.num_input_tokens)
        if self.hidden_dim is not None:
            require_positive_int(self, "hidden_dim")
        if self.num_input_tokens > 1:  # 1 stands for a number that is not known yet
            _blocks(self)

    def build(self) -> "PixelShuffle":
        return PixelShuffle(self)


def _blocks(config: PixelShuffleConfig) -> tuple[int, int]:
    """Rows and columns of blocks."""
    rows, columns = grid_of(config.num_input_tokens - config.skip_tokens, config.grid)
    if rows % config.factor or columns % config.factor:
        raise ValueError(
            f"factor={config.factor} does not divide the grid of {rows} x {columns} features"
        )
    return rows // config.factor, columns // config.factor


class PixelShuffle(Bridge):
    """`num_output_tokens` is the number of blocks."""

    config_class = PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__(config)
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim
        self.num_input_tokens = config.num_input_tokens
        self.skip_tokens = config.skip_tokens
        self.factor = config.factor
        self.blocks = _blocks(config)
        self.num_output_tokens = self.blocks[0] * self.blocks[1]
        joined, hidden = config.in_dim * config.factor**2, config.hidden_dim or config.out_dim
        self.proj = make_mlp(joined, hidden, config.out_dim, config.depth)

    def reset_parameters(self) -> None:
        """Initialise in place, as PyTorch initialises linear layers."""
        reset(self)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid count as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        require_shape(features_BND, self.num_input_tokens, self.in_dim)
        (h, w), side = self.blocks, self.factor
        kept_BND = blank(features_BND, mask_BN)[:, self.skip_tokens :]
        grid_BhrwsD = kept_BND.reshape(len(kept_BND), h, side, w, side, self.in_dim)
        joined_BMD = grid_BhrwsD.transpose(2, 3).reshape(len(kept_BND), h * w, -1)
        tokens_BME: Tensor = self.proj(joined_BMD)
        return tokens_BME
