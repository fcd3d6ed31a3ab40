"""The Perceiver resampler: learned latents read the features, layer after layer.

Flamingo (Alayrac et al. 2022, arXiv 2204.14198), section 3.1.1, with its 64 latents and 6 layers;
heads, the ReLU of the feed-forwards and layers without biases as in IDEFICS. Each layer's latents
look at features and latents together, then pass a feed-forward; both are pre-norm and residual.

Shape suffixes: B batch, N feature tokens, P patches, M latents, K = P + M keys, D width of the
features and latents, E width of the soft tokens, A heads, C width of one head.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentmodal.bridges.component import require_positive_int
from latentmodal.bridges.grid import POSITION_STD, PatchBridge, PatchConfig


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(PatchConfig):
    name: ClassVar[str] = "resampler"

    num_queries: int = 64
    """Latents, and so soft tokens."""
    layers: int = 6
    heads: int = 16
    head_dim: int = 96
    mlp_dim: int | None = None
    """Hidden width of the feed-forwards; None: four times `in_dim`."""
    input_positions: bool = False
    """Learned positions added to the features, for encoders whose tokens carry none."""

    def __post_init__(self) -> None:
        require_positive_int(self, "num_queries", "layers", "heads", "head_dim")
        if self.mlp_dim is not None:
            require_positive_int(self, "mlp_dim")
        super().__post_init__()

    def build(self) -> "Resampler":
        return Resampler(self)


class ResamplerLayer(nn.Module):
    """Latents attend to features and latents, then pass a feed-forward."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.feature_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, heads * head_dim, bias=False)
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, latents_BMD: Tensor, patches_BPD: Tensor, mask_B11K: Tensor | None) -> Tensor:
        """Latents (B, M, D) after this layer."""
        normed_BMD = self.latent_norm(latents_BMD)
        seen_BKD = torch.cat([self.feature_norm(patches_BPD), normed_BMD], dim=1)
        y_BAMC = F.scaled_dot_product_attention(
            self._split(self.query(normed_BMD)),
            self._split(self.key(seen_BKD)),
            self._split(self.value(seen_BKD)),
            attn_mask=mask_B11K,
        )
        latents_BMD = latents_BMD + self.out(y_BAMC.transpose(1, 2).flatten(2))
        mlp_BMD: Tensor = self.down(F.relu(self.up(self.mlp_norm(latents_BMD))))
        return latents_BMD + mlp_BMD

    def _split(self, x_BKX: Tensor) -> Tensor:
        return x_BKX.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Resampler(PatchBridge):
    """`num_queries` soft tokens, whatever the features.

    Latents start as normal noise of std 1, as published implementations have it.
    """

    config_class = ResamplerConfig
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = (ResamplerLayer,)

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__(config)
        width = config.in_dim
        self.num_output_tokens = config.num_queries
        self.latents = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.input_positions: nn.Parameter | None = None
        if config.input_positions:
            self.input_positions = nn.Parameter(torch.empty(1, config.num_patches, width))
        mlp_dim = config.mlp_dim or 4 * width
        self.layers = nn.ModuleList(
            ResamplerLayer(width, config.heads, config.head_dim, mlp_dim)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.out_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.latents)
        if self.input_positions is not None:
            nn.init.trunc_normal_(self.input_positions, std=POSITION_STD)

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E); those marked invalid are not looked at.

        Raises:
            ValueError: N or D is not what the config promised.
        """
        patches_BPD, mask_BP = self.patches(features_BND, mask_BN)
        if self.input_positions is not None:
            patches_BPD = patches_BPD + self.input_positions
        mask_B11K = None
        if mask_BP is not None:
            mask_B11K = F.pad(mask_BP, (0, self.num_output_tokens), value=True)[:, None, None]
        latents_BMD = self.latents.expand(len(patches_BPD), -1, -1)
        for layer in self.layers:
            latents_BMD = layer(latents_BMD, patches_BPD, mask_B11K)
        tokens_BME: Tensor = self.proj(self.norm(latents_BMD))
        return tokens_BME
