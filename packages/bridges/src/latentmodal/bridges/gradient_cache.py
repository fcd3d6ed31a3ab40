"""Encode a batch that does not fit, with the gradients of one that does.

A contrastive loss needs the features of the whole batch at once, but not the activations that led
to them. GradCache (Gao et al. 2021, arXiv 2101.06983) therefore encodes chunk by chunk without
keeping activations, takes the gradient of the loss with respect to all features, then encodes each
chunk again and back-propagates its share. Checkpointing every chunk is the same computation under
autograd's own control: the forward pass keeps inputs and features only; the backward pass reaches
the features once, then recomputes one chunk at a time, random numbers replayed, and feeds it the
gradient of its rows. Hence everything else in the graph (temperature, bias, an auxiliary loss) gets
its gradient once, DDP reduces each gradient once, and no second backward pass has to be organised.
"""

from collections.abc import Callable
from typing import cast, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@overload
def encode_in_chunks(
    encode: Callable[..., Tensor], inputs: tuple[Tensor, ...], chunk_size: int
) -> Tensor: ...


@overload
def encode_in_chunks(
    encode: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], chunk_size: int
) -> tuple[Tensor, ...]: ...


def encode_in_chunks(
    encode: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    chunk_size: int,
) -> Tensor | tuple[Tensor, ...]:
    """`encode(*inputs)`, holding the activations of `chunk_size` rows at most.

    The price is a second forward pass of `encode` during backward. Gradients are exact for every
    parameter, dropout included, as long as rows do not influence each other: batch normalisation
    in training mode would see chunks instead of the batch and count each twice in its averages.

    Args:
        encode: takes one chunk of every input; returns a tensor, or a tuple of tensors, with one
            row per row of the chunk.
        inputs: tensors with the same number of rows.
        chunk_size: rows of a chunk; the last may have fewer. A batch that fits in one chunk is
            encoded directly.

    Returns:
        What `encode` returns, for all rows.

    Raises:
        ValueError: `chunk_size` below 1, no inputs, or inputs of unequal length.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    lengths = [len(x) for x in inputs]
    if len(set(lengths)) != 1:
        raise ValueError(f"inputs have {lengths} rows; give at least one, all of equal length")
    if lengths[0] <= chunk_size:
        return encode(*inputs)

    outputs = [
        checkpoint(encode, *chunk, use_reentrant=False, preserve_rng_state=True)
        for chunk in zip(*(x.split(chunk_size) for x in inputs), strict=True)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.cat(cast(list[Tensor], outputs))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
