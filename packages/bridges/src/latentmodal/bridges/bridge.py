"""The one interface every bridge into a language model has: features in, soft tokens out.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from latentmodal.bridges.component import Component, ComponentConfig


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(ComponentConfig):
    """Config of a `Bridge`; subclass it with the fields of one kind of bridge."""

    def build(self) -> "Bridge":
        raise NotImplementedError


class Bridge(Component):
    """Turns an encoder's features into a fixed number of tokens of another latent space.

    The number of tokens is known before the forward pass, so a prompt can hold their places.
    """

    in_dim: int
    """Width D of the features it reads."""
    out_dim: int
    """Width E of the tokens it writes."""
    num_output_tokens: int
    """How many tokens M it writes for one sample."""
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Submodule classes to shard one by one; the bridge itself is always a unit as well."""

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features to soft tokens (B, M, E).

        Args:
            features_BND: the encoder's tokens.
            mask_BN: bool, True where a feature token is valid; None when all are.
        """
        raise NotImplementedError
