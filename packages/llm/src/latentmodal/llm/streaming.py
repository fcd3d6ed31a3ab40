"""Token ids of one answer while it is being said.

transformers generates in one call that returns at the end. It runs in a thread, where a stopping
criterion, asked after every token, passes on the tokens so far and stops when nobody listens.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Tap(StoppingCriteria):
    """Passes on the ids after every token; stops the model once `closed` is set."""

    def __init__(self, queue: "SimpleQueue[Any]") -> None:
        self.queue = queue
        self.closed = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.queue.put(input_ids[0].tolist())
        return torch.full((len(input_ids),), self.closed.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class _Last:
    """The end of a run: all ids, or what went wrong."""

    ids: list[int]
    error: BaseException | None = None


def stream_ids(
    run: Callable[[StoppingCriteria], Tensor], device: torch.device
) -> Generator[tuple[list[int], bool], None, None]:
    """All ids so far after every token, and at last ``(all ids, True)``.

    Args:
        run: generates one answer under a further stopping criterion; gives ids ``(1, T)``.
        device: of the model; the thread takes over its current device and autocast.

    Errors in ``run`` are raised here. Closing the iterator returns once the model has stopped.
    """
    queue: SimpleQueue[list[int] | _Last] = SimpleQueue()
    tap = Tap(queue)
    autocast = torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
    )

    def work() -> None:
        try:
            with ExitStack() as stack:
                if device.type == "cuda":
                    stack.enter_context(torch.cuda.device(device))
                stack.enter_context(autocast)
                queue.put(_Last(run(tap)[0].tolist()))
        except BaseException as error:
            queue.put(_Last([], error))

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _Last):
            yield item, False
        if item.error is not None:
            raise item.error
        yield item.ids, True
    finally:
        tap.closed.set()
        thread.join()
