"""Linear layers with GELU between them, applied to every feature token alike.

LLaVA-1.5 (Liu et al. 2023, arXiv 2310.03744) uses two of them.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import check_skip, make_mlp, require_shape, reset


@dataclass(frozen=True, kw_only=True)
class MlpProjectionConfig(BridgeConfig):
    name: ClassVar[str] = "mlp"

    in_dim: int
    out_dim: int
    num_input_tokens: int
    depth: int = 2
    """Linear layers."""
    hidden_dim: int | None = None
    """Width between them; None: `out_dim`."""
    skip_tokens: int = 0
    """Leading tokens to leave out, such as a CLS token."""

    def __post_init__(self) -> None:
        require_positive_int(self, "in_dim", "out_dim", "num_input_tokens", "depth")
        if self.hidden_dim is not None:
            require_positive_int(self, "hidden_dim")
        check_skip(self.skip_tokens, self.num_input_tokens)

    def build(self) -> "MlpProjection":
        return MlpProjection(self)


class MlpProjection(Bridge):
    """`num_output_tokens` is `num_input_tokens - skip_tokens`."""

    config_class = MlpProjectionConfig

    def __init__(self, config: MlpProjectionConfig) -> None:
        super().__init__(config)
        self.in_dim = config.in_dim
        self.out_dim = config.out_dim
        self.num_input_tokens = config.num_input_tokens
        self.skip_tokens = config.skip_tokens
        self.num_output_tokens = config.num_input_tokens - config.skip_tokens
        hidden = config.hidden_dim or config.out_dim
        self.proj = make_mlp(config.in_dim, hidden, config.out_dim, config.depth)

    def reset_parameters(self) -> None:
        """Initialise in place, as PyTorch initialises linear layers."""
        reset(self)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid come out as zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        require_shape(features_BND, self.num_input_tokens, self.in_dim)
        tokens_BME: Tensor = self.proj(features_BND[:, self.skip_tokens :])
        if mask_BN is not None:
            invalid_BM = ~mask_BN[:, self.skip_tokens :]
            tokens_BME = tokens_BME.masked_fill(invalid_BM.unsqueeze(-1), 0)
        return tokens_BME
