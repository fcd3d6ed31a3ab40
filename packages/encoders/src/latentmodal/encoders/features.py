"""What every encoder returns.

Shapes: B batch, N tokens, D width.
"""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """A sequence of feature tokens and one pooled feature per sample.

    Attributes:
        tokens_BND: what a bridge with cross-attention or a projection reads.
        pooled_BD: what a contrastive head reads. Its width is the encoder's `pooled_width`,
            which for nearly all models equals the token width.
        mask_BN: bool, True where a token is valid; None when all are.
    """

    tokens_BND: Tensor
    pooled_BD: Tensor
    mask_BN: Tensor | None = None
