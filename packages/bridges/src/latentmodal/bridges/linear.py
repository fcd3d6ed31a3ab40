"""The smallest bridge: one linear map, applied to every feature token alike.

MiniGPT-4 (arXiv 2304.10592) trains nothing else: Q-Former tokens of width 768 into the embedding
space of its language model.

Shape suffixes: B batch, N feature tokens, D width of the features, E width of the soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import blank, require_shape


@dataclass(frozen=True, kw_only=True)
class LinearProjectionConfig(BridgeConfig):
    name: ClassVar[str] = "linear"

    in_dim: int
    out_dim: int
    num_input_tokens: int

    def __post_init__(self) -> None:
        require_positive_int(self, "in_dim", "out_dim", "num_input_tokens")

    @property
    def input_tokens(self) -> int:
        return self.num_input_tokens

    def build(self) -> "LinearProjection":
        return LinearProjection(self)


class LinearProjection(Bridge):
    """`proj(features)`: as many tokens out as in (`num_output_tokens == num_input_tokens`)."""

    config_class = LinearProjectionConfig

    def __init__(self, config: LinearProjectionConfig) -> None:
        super().__init__(config)
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim
        self.num_output_tokens = config.num_input_tokens
        self.proj = nn.Linear(config.in_dim, config.out_dim)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, N, E).

        Tokens that `mask_BN` marks invalid come out as zeros, so that the content of padding
        never reaches the language model.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        require_shape(features_BND, self.num_output_tokens, self.in_dim)
        return blank(self.proj(features_BND), mask_BN)
