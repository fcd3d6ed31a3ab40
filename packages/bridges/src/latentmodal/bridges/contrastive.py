"""The contrastive head: two pooled features into one unit sphere, and its temperature.

The head of CLIP (arXiv 2103.00020), and with a bias on the logits that of SigLIP
(arXiv 2303.15343).

Shape suffixes: B images, M texts, D width of a tower's pooled feature, E embed dim.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.bridges.component import Component, ComponentConfig, require_positive_int

Projection = Literal["linear", "none"]


class ContrastiveOutput(NamedTuple):
    """Everything a contrastive loss takes."""

    image_BE: Tensor
    """L2-normalised rows."""
    text_BE: Tensor
    """L2-normalised rows; as many as there were texts."""
    logit_scale: Tensor
    """(1,), the factor itself, not its logarithm."""
    logit_bias: Tensor | None
    """(1,), or None for a head without one."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveHeadConfig(ComponentConfig):
    """CLIP's head by default; SigLIP's with `init_logit_scale=ln 10`, `init_logit_bias=-10`.

    A projection of "none" is for a tower that ends in one already; its width must be `embed_dim`.
    """

    name: ClassVar[str] = "contrastive"

    image_dim: int
    text_dim: int
    embed_dim: int
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    image_bias: bool = False
    text_bias: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    """Natural logarithm of the first scale."""
    init_logit_bias: float | None = None
    max_logit_scale: float = math.log(100)
    """Natural logarithm of the largest scale `clamp_temperature_` leaves."""

    def __post_init__(self) -> None:
        require_positive_int(self, "image_dim", "text_dim", "embed_dim")
        for tower in ("image", "text"):
            self._check_projection(tower)
        if not 0 <= self.init_logit_scale <= self.max_logit_scale:
            raise ValueError(
                f"init_logit_scale is {self.init_logit_scale}; it is a natural logarithm between 0 "
                f"and max_logit_scale={self.max_logit_scale} (CLIP: 2.6593, SigLIP: 2.3026)"
            )

    def _check_projection(self, tower: str) -> None:
        kind, width = getattr(self, f"{tower}_projection"), getattr(self, f"{tower}_dim")
        if kind not in ("linear", "none"):
            raise ValueError(f"{tower}_projection is {kind!r}; choose from linear, none")
        if kind == "none" and width != self.embed_dim:
            raise ValueError(
                f"{tower}_projection is 'none' but {tower}_dim={width} differs from "
                f"embed_dim={self.embed_dim}; make them equal or use 'linear'"
            )
        if kind == "none" and getattr(self, f"{tower}_bias"):
            raise ValueError(
                f"{tower}_bias is true but {tower}_projection is 'none'; there is nothing to bias"
            )

    def build(self) -> "ContrastiveHead":
        return ContrastiveHead(self)


class ContrastiveHead(Component):
    """Projects and normalises both modalities; owns `logit_scale` (a logarithm) and `logit_bias`.

    Both are of shape (1,), not scalars, because FSDP2 shards along the first dimension.
    """

    config_class = ContrastiveHeadConfig
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = ()
    fsdp_forward_methods: ClassVar[tuple[str, ...]] = ("embed_image", "embed_text")
    """Methods called besides `forward`; under FSDP2 pass each to `register_fsdp_forward_method`."""

    def __init__(self, config: ContrastiveHeadConfig) -> None:
        super().__init__(config)
        self.config: ContrastiveHeadConfig = config
        self.image_proj = _projection(
            config.image_projection, config.image_dim, config.embed_dim, config.image_bias
        )
        self.text_proj = _projection(
            config.text_projection, config.text_dim, config.embed_dim, config.text_bias
        )
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place; also after `to_empty`, and when the parameters are sharded."""
        for projection in (self.image_proj, self.text_proj):
            if isinstance(projection, _ScaledLinear):
                projection.reset_parameters()
        self.logit_scale.fill_(self.config.init_logit_scale)
        if self.logit_bias is not None:
            assert self.config.init_logit_bias is not None
            self.logit_bias.fill_(self.config.init_logit_bias)

    def forward(self, image_BD: Tensor, text_MD: Tensor) -> ContrastiveOutput:
        """Embed both pooled features (B, image_dim) and (M, text_dim) for a loss."""
        # Not through `embed_*`: as forward methods of their own under FSDP2 they would free the
        # parameters again before the rest of this one has read them.
        return ContrastiveOutput(
            image_BE=unit_rows(self.image_proj(image_BD)),
            text_BE=unit_rows(self.text_proj(text_MD)),
            logit_scale=self.logit_scale.exp(),
            # A copy, because FSDP2 frees the storage of the parameter when forward returns.
            logit_bias=None if self.logit_bias is None else self.logit_bias.clone(),
        )

    def embed_image(self, pooled_BD: Tensor) -> Tensor:
        """(B, image_dim) to unit rows (B, E), in float32 or better."""
        return unit_rows(self.image_proj(pooled_BD))

    def embed_text(self, pooled_MD: Tensor) -> Tensor:
        """(M, text_dim) to unit rows (M, E), in float32 or better."""
        return unit_rows(self.text_proj(pooled_MD))

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the scale within [1, exp(max_logit_scale)]; call after every optimiser step."""
        self.logit_scale.clamp_(0, self.config.max_logit_scale)


class _ScaledLinear(nn.Linear):
    """Linear layer with CLIP's initialisation: normal of std in_features ** -0.5, zero bias."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _projection(kind: Projection, in_dim: int, out_dim: int, bias: bool) -> nn.Module:
    return nn.Identity() if kind == "none" else _ScaledLinear(in_dim, out_dim, bias=bias)


def unit_rows(x_BE: Tensor) -> Tensor:
    """L2-normalise along the last dimension, in float32 or better."""
    # Half precision would round the cosine at its third digit, which a scale of 100 multiplies.
    wide_BE = x_BE if x_BE.dtype == torch.float64 else x_BE.float()
    return F.normalize(wide_BE, dim=-1)
