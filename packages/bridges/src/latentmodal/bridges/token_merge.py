"""Neighbouring raster tokens joined into one and mapped linearly.

MiniGPT-4's variant without a Q-Former (Zhu et al. 2023, arXiv 2304.10592; the Llama-2 release): the
256 patches of EVA ViT-g/14, four consecutive ones of the raster at a time (a strip, not a square),
make 64 tokens.

Shape suffixes: B batch, N feature tokens, P patches, M soft tokens, D width of the features, E
width of the soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import PatchBridge, PatchConfig, blank


@dataclass(frozen=True, kw_only=True)
class TokenMergeConfig(PatchConfig):
    name: ClassVar[str] = "token_merge"

    merge: int = 4
    """Consecutive tokens that become one."""
    input_norm: bool = False
    """A LayerNorm over the features first. MiniGPT-4 has one that is never loaded nor trained:
    freeze it to have the same."""

    def __post_init__(self) -> None:
        require_positive_int(self, "merge")
        super().__post_init__()

    def check_patches(self) -> None:
        super().check_patches()
        if self.num_patches % self.merge:
            raise ValueError(
                f"merge={self.merge} does not divide the {self.num_patches} tokens left of "
                f"num_input_tokens={self.num_input_tokens} by skip_tokens={self.skip_tokens}"
            )

    def build(self) -> "TokenMerge":
        return TokenMerge(self)


class TokenMerge(PatchBridge):
    """`num_output_tokens` is `(num_input_tokens - skip_tokens) / merge`."""

    config_class = TokenMergeConfig

    def __init__(self, config: TokenMergeConfig) -> None:
        super().__init__(config)
        self.num_output_tokens = config.num_patches // config.merge
        self.input_norm = nn.LayerNorm(config.in_dim) if config.input_norm else None
        self.proj = nn.Linear(config.in_dim * config.merge, config.out_dim)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid count as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        if self.input_norm is not None:
            patches_BPD = self.input_norm(patches_BPD)
        joined_BMD = blank(patches_BPD, mask_BP).unflatten(1, (self.num_output_tokens, -1))
        tokens_BME: Tensor = self.proj(joined_BMD.flatten(2))
        return tokens_BME
