"""Square blocks of the feature grid joined into one token each, then mapped.

Space to depth, after Shi et al. 2016 (arXiv 1609.05158) read backwards; as a bridge in InternVL 1.5
(arXiv 2404.16821) and Idefics3 (arXiv 2408.12637). Within a block, features are joined row by row.

Shape suffixes: B batch, N feature tokens, P patches, M soft tokens, D width of the features, E
width of the soft tokens, h w rows and columns of blocks, r s place in a block.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import GridConfig, PatchBridge, blank, make_mlp


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(GridConfig):
    name: ClassVar[str] = "pixel_shuffle"

    factor: int = 2
    """Side of a block."""
    depth: int = 1
    """Linear layers of the map, GELU between them."""
    hidden_dim: int | None = None
    """Width between them; None: `out_dim`."""

    def __post_init__(self) -> None:
        require_positive_int(self, "factor", "depth")
        if self.hidden_dim is not None:
            require_positive_int(self, "hidden_dim")
        super().__post_init__()

    def check_patches(self) -> None:
        super().check_patches()
        rows, columns = self.rows_columns
        if rows % self.factor or columns % self.factor:
            raise ValueError(
                f"factor={self.factor} does not divide the grid of {rows} x {columns} features"
            )

    def build(self) -> "PixelShuffle":
        return PixelShuffle(self)


class PixelShuffle(PatchBridge):
    """`num_output_tokens` is the number of blocks."""

    config_class = PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig) -> None:
        super().__init__(config)
        rows, columns = config.rows_columns
        self.factor = config.factor
        self.blocks = (rows // config.factor, columns // config.factor)
        self.num_output_tokens = self.blocks[0] * self.blocks[1]
        joined, hidden = config.in_dim * config.factor**2, config.hidden_dim or config.out_dim
        self.proj = make_mlp(joined, hidden, config.out_dim, config.depth)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid count as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        (h, w), side = self.blocks, self.factor
        grid_BhrwsD = blank(patches_BPD, mask_BP).unflatten(1, (h, side, w, side))
        joined_BMD = grid_BhrwsD.transpose(2, 3).flatten(1, 2).flatten(2)
        tokens_BME: Tensor = self.proj(joined_BMD)
        return tokens_BME
