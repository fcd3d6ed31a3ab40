"""Where the queries of a Q-Former look.

The attention kernels of training give no weights, so these are computed once more, beside the
forward pass, from the same queries and keys.

Shape suffixes: B batch, L layers with cross-attention, M queries, N feature tokens, D width, H
heads, C width of one head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentmodal.bridges.qformer import QFormer
from latentmodal.bridges.qformer_layers import CrossAttention, KeyValue, split_heads


def cross_attention_maps(
    qformer: QFormer, features_BND: Tensor, mask_BN: Tensor | None = None
) -> Tensor:
    """Attention weights (B, L, M, N) of the queries alone with an image, mean over heads, fp32.

    Args:
        qformer: in eval mode, or dropout disturbs the rows between its layers.
        features_BND: the encoder's tokens.
        mask_BN: True where a token is valid; None: everywhere.
    """
    with torch.no_grad(), record_cross_attention(qformer) as maps_LBMN:
        qformer(features_BND, mask_BN)
    return torch.stack(maps_LBMN, dim=1)


@contextmanager
def record_cross_attention(qformer: QFormer) -> Iterator[list[Tensor]]:
    """Weights (B, M, N) of every cross-attention that runs inside this context, in order.

    For a Q-Former within a larger model, whose own methods must run it (a sharded one has its
    weights only there).
    """
    maps: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, CrossAttention)
        maps.append(_weights(module, *inputs))

    layers = [module for module in qformer.modules() if isinstance(module, CrossAttention)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _weights(
    layer: CrossAttention, x_BMD: Tensor, keys: KeyValue, mask_B11N: Tensor | None
) -> Tensor:
    query_BHMC = split_heads(layer.query(x_BMD), layer.heads).float()
    with torch.autocast(x_BMD.device.type, enabled=False):
        scores_BHMN = query_BHMC @ keys.key.float().mT * query_BHMC.shape[-1] ** -0.5
    if mask_B11N is not None:
        scores_BHMN = scores_BHMN.masked_fill(~mask_B11N, -torch.inf)
    return scores_BHMN.softmax(dim=-1).mean(dim=1)
