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


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of all ranks' `x`, without gradient; `x` itself for a single process."""
    if world_size(group) == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def fetch_rows(x: Tensor, wanted_K: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of the batch that all ranks hold together, sending only those that are asked for.

    With W ranks of B rows, a gather hands every rank (W - 1) * B rows of others; this hands it the
    at most K that it wants. Gradients go back the way the rows came. The host waits once, for the
    number of rows each rank is to send.

    Args:
        x: (B, ...), of one shape on all ranks.
        wanted_K: int64, places in the concatenation of all ranks' rows; the same K on every rank.

    Returns:
        (K, ...).
    """
    if world_size(group) == 1:
        return x.index_select(0, wanted_K)
    wanted_WK = all_gather(wanted_K, group).view(world_size(group), -1)
    owner_WK = wanted_WK // x.shape[0]
    counts = (owner_WK[..., None] == torch.arange(len(owner_WK), device=x.device)).sum(dim=1)
    counts_WW = counts.tolist()  # [r][s]: rows that rank r wants of rank s
    me = rank(group)
    sent = [counts_WW[reader][me] for reader in range(len(counts_WW))]
    mine_X = (owner_WK == me).flatten()
    outgoing = torch.nonzero_static(mine_X, size=sum(sent)).squeeze(1)
    rows = x.index_select(0, wanted_WK.flatten().index_select(0, outgoing) - me * x.shape[0])
    arrived: Tensor = _Exchange.apply(rows, sent, counts_WW[me], group)
    # They come sorted by owner, in the order asked for within each.
    order_K = torch.argsort(owner_WK[me], stable=True)
    place_K = torch.empty_like(order_K)
    place_K[order_K] = torch.arange(len(order_K), device=x.device)
    return arrived.index_select(0, place_K)


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


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; the backward pass sends the gradients home."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sent: list[int],
        received: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


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
