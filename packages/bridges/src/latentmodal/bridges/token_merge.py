"""Neighbouring raster tokens joined into one and mapped linearly.

MiniGPT-4's variant without a Q-Former (Zhu et al. 2023, arXiv 2304.10592; the Llama-2 release): the
256 patches of EVA ViT-g/14, four consecutive ones of the raster at a time (a strip, not a square),
make 64 tokens.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import blank, check_skip, require_shape, reset


@dataclass(frozen=True, kw_only=True)
class TokenMergeConfig(BridgeConfig):
    name: ClassVar[str] = "token_merge"

    in_dim: int
    out_dim: int
    num_input_tokens: int
    merge: int = 4
    """Consecutive tokens that become one."""
    skip_tokens: int = 0
    """Leading tokens to leave out, such as a CLS token."""
    input_norm: bool = False
    """A LayerNorm over the features first. MiniGPT-4 has one that is never loaded nor trained:
    freeze it to have the same."""

    def __post_init__(self) -> None:
        require_positive_int(self, "in_dim", "out_dim", "num_input_tokens", "merge")
        check_skip(self.skip_tokens, self.num_input_tokens)
        if self.num_input_tokens > 1:  # 1 stands for a number that is not known yet
            _count(self)

    def build(self) -> "TokenMerge":
        return TokenMerge(self)


def _count(config: TokenMergeConfig) -> int:
    """Tokens that come out."""
    left = config.num_input_tokens - config.skip_tokens
    if left % config.merge:
        raise ValueError(
            f"merge={config.merge} does not divide the {left} tokens left of "
            f"num_input_tokens={config.num_input_tokens} by skip_tokens={config.skip_tokens}"
        )
    return left // config.merge


class TokenMerge(Bridge):
    """`num_output_tokens` is `(num_input_tokens - skip_tokens) / merge`."""

    config_class = TokenMergeConfig

    def __init__(self, config: TokenMergeConfig) -> None:
        super().__init__(config)
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim
        self.num_input_tokens = config.num_input_tokens
        self.skip_tokens = config.skip_tokens
        self.num_output_tokens = _count(config)
        self.input_norm = nn.LayerNorm(config.in_dim) if config.input_norm else None
        self.proj = nn.Linear(config.in_dim * config.merge, config.out_dim)

    def reset_parameters(self) -> None:
        """Initialise in place, as PyTorch initialises a linear layer."""
        reset(self)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid count as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        require_shape(features_BND, self.num_input_tokens, self.in_dim)
        if self.input_norm is not None:
            features_BND = self.input_norm(features_BND)
        kept_BND = blank(features_BND, mask_BN)[:, self.skip_tokens :]
        tokens_BME: Tensor = self.proj(kept_BND.reshape(len(kept_BND), self.num_output_tokens, -1))
        return tokens_BME
