"""What autograd keeps: a count of bytes that nothing else on the machine can disturb."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(loss: Callable[[], Tensor], leave_out: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors autograd saves for the backward pass of `loss()`.

    Args:
        loss: the forward pass.
        leave_out: tensors that exist anyway, such as parameters and inputs.
    """
    storages: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        value = loss()  # alive until counted, so that no address is used twice
    for x in leave_out:
        storages.pop(x.untyped_storage().data_ptr(), None)
    del value
    return sum(storages.values())
