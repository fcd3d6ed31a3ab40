"""Collectives that carry gradients. Without a process group they are the identity."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (default: all); 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's place in `group` (default: all); 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather_with_grad(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the `x` of all W ranks along dim 0, in rank order, gradients included.

    The backward pass sums the gradients that all ranks hold for a row and hands them to the rank
    the row came from. Under DDP or FSDP, which divide gradients by W, a loss that is the mean over
    *local* rows therefore gives exactly the single-process gradient; do not multiply it by W.

    Args:
        x: (B, ...), of one shape on all ranks.

    Returns:
        (W*B, ...); `x` itself for a single process.

    Raises:
        ValueError: the shapes differ. Looked for on the CPU only (see `check_equal_shapes`).
    """
    if world_size(group) == 1:
        return x
    check_equal_shapes(x, group=group)
    gathered: Tensor = _Gather.apply(x, group)
    return gathered


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`gather_with_grad` for what has no gradient, and without its check of the shapes."""
    size = world_size(group)
    if size == 1:
        return x
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def check_equal_shapes(*tensors: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank unless each tensor has one shape on all of them.

    Unequal shapes make a collective hang or mix up rows. On the CPU one tiny gather finds them. On
    an accelerator reading its result would make the host wait in every step, so nothing is
    checked there: let the loader drop the last incomplete batch, and to look for a suspected
    mismatch set PyTorch's TORCH_DISTRIBUTED_DEBUG=DETAIL.

    Raises:
        ValueError: the shapes differ.
    """
    if world_size(group) == 1 or tensors[0].device.type != "cpu":
        return
    # The first two dimensions tell a short batch or another embedding width.
    mine = [(*t.shape, 0, 0)[:2] for t in tensors]
    shapes = all_gather(torch.tensor([mine]), group).tolist()
    if any(shape != shapes[0] for shape in shapes):
        listed = "; ".join(f"rank {i}: {shape}" for i, shape in enumerate(shapes))
        raise ValueError(
            f"ranks hold batches of different shape ({listed}); give every rank as many rows, for "
            "example by dropping the last incomplete batch"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        ctx.local_shape = x.shape
        return all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local = grad.new_empty(ctx.local_shape)
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None
