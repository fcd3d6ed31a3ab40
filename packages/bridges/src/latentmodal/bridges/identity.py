"""The tokens as they are, for encoders that write into the language model's own space.

Shape suffixes: B batch, N feature tokens, P = M soft tokens, D width of the features.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentmodal.bridges.bridge import OutputWidth
from latentmodal.bridges.grid import PatchBridge, PatchConfig, blank


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(PatchConfig):
    name: ClassVar[str] = "identity"
    output_width: ClassVar[OutputWidth] = "kept"

    def build(self) -> "Identity":
        return Identity(self)


class Identity(PatchBridge):
    """`num_output_tokens` is `num_input_tokens - skip_tokens`; there is nothing to train."""

    config_class = IdentityConfig

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__(config)
        self.num_output_tokens = config.num_patches

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Features (B, N, D) without the leading tokens: (B, M, D); invalid ones become zeros.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        return blank(*self.patches(features_BND, mask_BN))
