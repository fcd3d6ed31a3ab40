"""Bridges between latent spaces, and the losses that train them.

Needs PyTorch and safetensors only, so that it can be used outside the trainer it was made for.
"""

from latentmodal.bridges.alignment import (
    AlignmentHead,
    AlignmentHeadConfig,
    AlignmentOutput,
)
from latentmodal.bridges.average_pool import AveragePool, AveragePoolConfig
from latentmodal.bridges.bridge import Bridge, BridgeConfig
from latentmodal.bridges.c_abstractor import CAbstractor, CAbstractorConfig
from latentmodal.bridges.chain import Chain, ChainConfig
from latentmodal.bridges.component import Component, ComponentConfig
from latentmodal.bridges.contrastive import (
    ContrastiveHead,
    ContrastiveHeadConfig,
    ContrastiveOutput,
)
from latentmodal.bridges.distributed import fetch_rows, gather_with_grad, rank, world_size
from latentmodal.bridges.gradient_cache import encode_in_chunks
from latentmodal.bridges.identity import Identity, IdentityConfig
from latentmodal.bridges.linear import LinearProjection, LinearProjectionConfig
from latentmodal.bridges.losses import info_nce, sigmoid_loss
from latentmodal.bridges.mlp import MlpProjection, MlpProjectionConfig
from latentmodal.bridges.pixel_shuffle import PixelShuffle, PixelShuffleConfig
from latentmodal.bridges.qformer import ImageKeys, QFormer, QFormerConfig, QueryStates
from latentmodal.bridges.registry import BRIDGES, COMPONENTS, build_bridge, load
from latentmodal.bridges.resampler import Resampler, ResamplerConfig
from latentmodal.bridges.token_merge import TokenMerge, TokenMergeConfig

__all__ = [
    "BRIDGES",
    "COMPONENTS",
    "AlignmentHead",
    "AlignmentHeadConfig",
    "AlignmentOutput",
    "AveragePool",
    "AveragePoolConfig",
    "Bridge",
    "BridgeConfig",
    "CAbstractor",
    "CAbstractorConfig",
    "Chain",
    "ChainConfig",
    "Component",
    "ComponentConfig",
    "ContrastiveHead",
    "ContrastiveHeadConfig",
    "ContrastiveOutput",
    "Identity",
    "IdentityConfig",
    "ImageKeys",
    "LinearProjection",
    "LinearProjectionConfig",
    "MlpProjection",
    "MlpProjectionConfig",
    "PixelShuffle",
    "PixelShuffleConfig",
    "QFormer",
    "QFormerConfig",
    "QueryStates",
    "Resampler",
    "ResamplerConfig",
    "TokenMerge",
    "TokenMergeConfig",
    "build_bridge",
    "encode_in_chunks",
    "fetch_rows",
    "gather_with_grad",
    "info_nce",
    "load",
    "rank",
    "sigmoid_loss",
    "world_size",
]
