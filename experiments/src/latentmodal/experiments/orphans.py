"""No process outlives the one that it works for, however that one ended."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(*_: object) -> None:
    """Have the system kill this process when the thread that started it ends (Linux).

    A worker of a data loader that lost its trainer to SIGKILL would wait for ever to hand its
    batches over, and keep what it inherited: memory, and locks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopted(parent: int) -> bool:
    """Whether `parent` was gone before anything could be told of its end."""
    return os.getppid() != parent
