"""Linear layers with GELU between them, applied to every feature token alike.

LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) uses two of them.

Shape suffixes: B batch, N feature tokens, P = M soft tokens, D width of the features, E width of
the soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import PatchBridge, PatchConfig, blank, make_mlp


@dataclass(frozen=True, kw_only=True)
class MlpProjectionConfig(PatchConfig):
    name: ClassVar[str] = "mlp"

    depth: int = 2
    """Linear layers."""
    hidden_dim: int | None = None
    """Width between them; None: `out_dim`."""

    def __post_init__(self) -> None:
        require_positive_int(self, "depth")
        if self.hidden_dim is not None:
            require_positive_int(self, "hidden_dim")
        super().__post_init__()

    def build(self) -> "MlpProjection":
        return MlpProjection(self)


class MlpProjection(PatchBridge):
    """`num_output_tokens` is `num_input_tokens - skip_tokens`."""

    config_class = MlpProjectionConfig

    def __init__(self, config: MlpProjectionConfig) -> None:
        super().__init__(config)
        self.num_output_tokens = config.num_patches
        hidden = config.hidden_dim or config.out_dim
        self.proj = make_mlp(config.in_dim, hidden, config.out_dim, config.depth)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid come out as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        return blank(self.proj(patches_BPD), mask_BP)
