"""The heads of BLIP-2's first stage: one space for retrieval, and the verdict on a pair.

Li et al. 2023 (arXiv 2301.12597), section 3.1.

Shape suffixes: B images or texts, M queries, D width of the Q-Former, E embed dim, R pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from latentmodal.bridges.component import Component, ComponentConfig, require_positive_int
from latentmodal.bridges.contrastive import unit_rows


class AlignmentOutput(NamedTuple):
    """What the contrastive objective takes."""

    image_BME: Tensor
    """L2-normalised, one row per query."""
    text_BE: Tensor
    """L2-normalised."""
    temperature: Tensor
    """(1,); similarities are divided by it."""


@dataclass(frozen=True, kw_only=True)
class AlignmentHeadConfig(ComponentConfig):
    """A head for each objective that needs one; an objective that is off has no parameters."""

    name: ClassVar[str] = "alignment"

    width: int
    embed_dim: int = 256
    init_temperature: float = 0.07
    min_temperature: float = 0.001
    max_temperature: float = 0.5
    contrastive: bool = True
    matching: bool = True

    def __post_init__(self) -> None:
        require_positive_int(self, "width", "embed_dim")
        if not 0 < self.min_temperature <= self.init_temperature <= self.max_temperature:
            raise ValueError(
                f"init_temperature is {self.init_temperature}; it must lie between "
                f"min_temperature={self.min_temperature} (above 0) and "
                f"max_temperature={self.max_temperature}"
            )

    def build(self) -> "AlignmentHead":
        return AlignmentHead(self)


class AlignmentHead(Component):
    """`image_proj`, `text_proj` and `temperature` for retrieval; `itm_head` for matching.

    The temperature divides, as in BLIP-2, and is of shape (1,): a vector is never decayed, and
    FSDP2 shards along the first dimension.
    """

    config_class = AlignmentHeadConfig
    fsdp_units: ClassVar[tuple[type[nn.Module], ...]] = ()
    fsdp_forward_methods: ClassVar[tuple[str, ...]] = ("embed_image", "embed_text", "match_logits")
    """Methods called besides `forward`; under FSDP2 pass each to `register_fsdp_forward_method`."""

    def __init__(self, config: AlignmentHeadConfig) -> None:
        super().__init__(config)
        self.config: AlignmentHeadConfig = config
        self.image_proj: nn.Linear | None = None
        self.text_proj: nn.Linear | None = None
        self.temperature: nn.Parameter | None = None
        if config.contrastive:
            self.image_proj = nn.Linear(config.width, config.embed_dim)
            self.text_proj = nn.Linear(config.width, config.embed_dim)
            self.temperature = nn.Parameter(torch.empty(1))
        self.itm_head = nn.Linear(config.width, 2) if config.matching else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise in place: PyTorch's linear layers, and the first temperature."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        if self.temperature is not None:
            self.temperature.fill_(self.config.init_temperature)

    def forward(self, query_BMD: Tensor, text_BD: Tensor) -> AlignmentOutput:
        """Embed queries and the first text token for the contrastive objective."""
        assert self.image_proj is not None and self.text_proj is not None
        assert self.temperature is not None
        return AlignmentOutput(
            image_BME=unit_rows(self.image_proj(query_BMD)),
            text_BE=unit_rows(self.text_proj(text_BD)),
            # A copy, because FSDP2 frees the storage of the parameter when forward returns.
            temperature=self.temperature.clone(),
        )

    def embed_image(self, query_BMD: Tensor) -> Tensor:
        """(B, M, D) to unit rows (B, M, E)."""
        assert self.image_proj is not None
        return unit_rows(self.image_proj(query_BMD))

    def embed_text(self, text_BD: Tensor) -> Tensor:
        """(B, D) to unit rows (B, E)."""
        assert self.text_proj is not None
        return unit_rows(self.text_proj(text_BD))

    def match_logits(self, query_RMD: Tensor) -> Tensor:
        """Logits (R, 2) of "does not fit" and "fits": each query votes, the votes are averaged."""
        assert self.itm_head is not None
        logits_RM2: Tensor = self.itm_head(query_RMD)
        return logits_RM2.mean(dim=1)

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the temperature within its bounds; call after every optimiser step."""
        if self.temperature is not None:
            self.temperature.clamp_(self.config.min_temperature, self.config.max_temperature)
