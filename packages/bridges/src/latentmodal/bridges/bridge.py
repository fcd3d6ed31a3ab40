"""The one interface every bridge into a language model has: features in, soft tokens out.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from latentmodal.bridges.component import Component, ComponentConfig

OutputWidth = Literal["given", "own", "kept"]


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(ComponentConfig):
    """Config of a `Bridge`; subclass it with the fields of one kind of bridge.

    The class variables say how a bridge fits between neighbours, so that whoever assembles a model
    can fill in its shapes without knowing the kind.
    """

    shape_fields: ClassVar[tuple[str, ...]] = ("in_dim", "out_dim", "num_input_tokens")
    """Fields that follow from the neighbours. While those are not known each may be 1, and what
    depends on them is not looked at."""
    output_width: ClassVar[OutputWidth] = "given"
    """Whether `out_dim` is free to choose (`given`), may be None for a width that the bridge has by
    nature (`own`), or must be `in_dim` (`kept`)."""

    @property
    def input_tokens(self) -> int | None:
        """How many feature tokens it reads; None: any number."""
        return None

    @abstractmethod
    def build(self) -> "Bridge":
        """Make the bridge, freshly initialised."""


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

    def reset_parameters(self) -> None:
        """Initialise in place, every submodule as PyTorch does; also after `to_empty`.

        A bridge with parameters of its own, outside any submodule, extends this.
        """
        for child in self.modules():
            if child is not self and any(True for _ in child.parameters(recurse=False)):
                layer: Any = child
                layer.reset_parameters()

    @abstractmethod
    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features to soft tokens (B, M, E).

        Args:
            features_BND: the encoder's tokens.
            mask_BN: bool, True where a feature token is valid; None when all are.
        """
