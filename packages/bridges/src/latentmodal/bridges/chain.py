"""Bridges one after another, as one bridge.

MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592) is a frozen Q-Former and a linear map that trains.

Shape suffixes: B batch, N feature tokens, M soft tokens, D width of the features, E width of the
soft tokens.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.component import ComponentConfig, load_component, make_config


@dataclass(frozen=True, kw_only=True)
class ChainConfig(BridgeConfig):
    """What one part writes the next one reads."""

    name: ClassVar[str] = "chain"
    shape_fields: ClassVar[tuple[str, ...]] = ()

    parts: tuple[BridgeConfig, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"parts has {len(self.parts)} bridges; a chain needs two or more")

    @property
    def input_tokens(self) -> int | None:
        return self.parts[0].input_tokens

    def build(self) -> "Chain":
        return Chain(self)

    def to_fields(self) -> dict[str, Any]:
        return {"parts": [{"bridge": part.name, **part.to_fields()} for part in self.parts]}

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Any], table: Mapping[str, type[ComponentConfig]]
    ) -> "ChainConfig":
        listed = fields.get("parts")
        if not isinstance(listed, Sequence) or any(key != "parts" for key in fields):
            raise ValueError("bridge 'chain' has one field, parts: a list of bridges")
        parts = []
        for index, entry in enumerate(listed):
            if not isinstance(entry, Mapping):
                raise ValueError(f"parts[{index}] is {entry!r}; it must be a bridge's fields")
            own = {key: value for key, value in entry.items() if key != "bridge"}
            part = make_config(entry.get("bridge"), own, table)
            if not isinstance(part, BridgeConfig):
                raise ValueError(f"parts[{index}] is {part.name!r}, which is no bridge")
            parts.append(part)
        return cls(parts=tuple(parts))


class Chain(Bridge):
    """`parts` in turn; a mask is for the first, whose tokens are all valid.

    Where one part is frozen and another trains, shard every part as a unit of its own.
    """

    config_class = ChainConfig

    def __init__(self, config: ChainConfig) -> None:
        super().__init__(config)
        bridges = [part.build() for part in config.parts]
        for index, (before, after) in enumerate(pairwise(bridges)):
            if before.out_dim != after.in_dim:
                raise ValueError(
                    f"parts[{index}] writes tokens of width {before.out_dim}, parts[{index + 1}] "
                    f"reads in_dim={after.in_dim}; make them equal"
                )
            reads = config.parts[index + 1].input_tokens
            if reads not in (None, before.num_output_tokens):
                raise ValueError(
                    f"parts[{index}] writes {before.num_output_tokens} tokens, parts[{index + 1}] "
                    f"reads {reads}; make them equal"
                )
        self.parts = nn.ModuleList(bridges)
        self.in_dim = bridges[0].in_dim
        self.out_dim = bridges[-1].out_dim
        self.num_output_tokens = bridges[-1].num_output_tokens
        units = [unit for bridge in bridges for unit in bridge.fsdp_units]
        self.fsdp_units = tuple(dict.fromkeys(units))  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Load a folder known to hold a chain, of whatever bridges.

        Raises:
            ValueError: see `load_component`.
        """
        # The table names this module's config: imported above they make a circle.
        from latentmodal.bridges.registry import BRIDGES

        module = load_component(folder, BRIDGES)
        if not isinstance(module, cls):
            raise ValueError(f"{folder} holds {module.config.name!r}, not 'chain'; use load")
        return module

    def reset_parameters(self) -> None:
        """Initialise every part in place."""
        for part in self.parts:
            assert isinstance(part, Bridge)
            part.reset_parameters()

    def forward(self, features_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """Map features (B, N, D) to tokens (B, M, E).

        Raises:
            ValueError: as the parts do.
        """
        tokens_BME: Tensor = self.parts[0](features_BND, mask_BN)
        for part in self.parts[1:]:
            tokens_BME = part(tokens_BME)
        return tokens_BME
