"""The tables of names. To add a bridge: write its module, add its config to `BRIDGES`."""

import os
from typing import Any, TypeVar

from latentmodal.bridges.alignment import AlignmentHeadConfig
from latentmodal.bridges.average_pool import AveragePoolConfig
from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.c_abstractor import CAbstractorConfig
from latentmodal.bridges.chain import ChainConfig
from latentmodal.bridges.component import Component, ComponentConfig, load_component, make_config
from latentmodal.bridges.contrastive import ContrastiveHeadConfig
from latentmodal.bridges.identity import IdentityConfig
from latentmodal.bridges.linear import LinearProjectionConfig
from latentmodal.bridges.mlp import MlpProjectionConfig
from latentmodal.bridges.pixel_shuffle import PixelShuffleConfig
from latentmodal.bridges.qformer import QFormerConfig
from latentmodal.bridges.resampler import ResamplerConfig
from latentmodal.bridges.token_merge import TokenMergeConfig

ConfigT = TypeVar("ConfigT", bound=ComponentConfig)


def by_name(*configs: type[ConfigT]) -> dict[str, type[ConfigT]]:
    """Table of configs under their names.

    Raises:
        ValueError: two configs claim one name.
    """
    table: dict[str, type[ConfigT]] = {}
    for config in configs:
        if config.name in table:
            raise ValueError(
                f"name {config.name!r} is claimed by {table[config.name].__name__} and "
                f"{config.__name__}; rename one"
            )
        table[config.name] = config
    return table


BRIDGES: dict[str, type[BridgeConfig]] = by_name(
    LinearProjectionConfig,
    MlpProjectionConfig,
    TokenMergeConfig,
    PixelShuffleConfig,
    AveragePoolConfig,
    QFormerConfig,
    ResamplerConfig,
    CAbstractorConfig,
    IdentityConfig,
    ChainConfig,
)
"""What turns features into soft tokens."""

COMPONENTS: dict[str, type[ComponentConfig]] = by_name(
    *BRIDGES.values(), ContrastiveHeadConfig, AlignmentHeadConfig
)
"""Everything that `load` can read: the bridges, and the heads of their objectives."""


def build_bridge(name: str, **fields: Any) -> Bridge:
    """Build the bridge called `name` from the fields of its config.

    Raises:
        ValueError: unknown name (the message lists the choices), unknown or missing field, or a
            value the config refuses.
    """
    bridge = make_config(name, fields, BRIDGES).build()
    assert isinstance(bridge, Bridge)
    return bridge


def load(folder: str | os.PathLike[str]) -> Component:
    """Load whatever `save_pretrained` wrote to `folder`, or `push_to_hub` to `hf://owner/name`.

    Raises:
        ValueError: see `latentmodal.bridges.component.load_component`.
    """
    return load_component(folder, COMPONENTS)
