"""Sides take turns: one process each, kept alive, never two at work at the same time.

A process of its own gives each side its own allocator, caches and peak memory; taking turns within
seconds of each other gives both the same weather. One round is one step of every side, forwards
and backwards by turns. A round during which other programs used the CPUs is thrown away.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

Step = Mapping[str, float]
"""Seconds of each phase of a step."""


class Turn(NamedTuple):
    """One step of one side, and how busy others kept the machine meanwhile."""

    step: Step
    others: float
    """CPU seconds of other processes."""
    capacity: float
    """CPU seconds there were."""


class Summary(NamedTuple):
    """What is reported of a ratio."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Median and quartiles of at least two values."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


class Remote:
    """A side in a process of its own; `call` runs one of its methods there."""

    def __init__(self, build: Callable[..., Any], *args: Any) -> None:
        # A server imports the slow packages once and forks the sides, alike but for what they run.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["open_clip", "latentmodal.experiments.recipe"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, *args), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # built

    def call(self, method: str, *args: Any) -> Any:
        """Run `method` over there and return what it returns."""
        self._connection.send((method, args))
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


@contextmanager
def remotes(builds: Sequence[tuple[Any, ...]]) -> Iterator[list[Remote]]:
    """One `Remote(*arguments)` for each item, closed in the end."""
    with ExitStack() as stack:
        sides = []
        for arguments in builds:
            side = Remote(*arguments)
            stack.callback(side.close)
            sides.append(side)
        yield sides


def _serve(connection: Connection, build: Callable[..., Any], *args: Any) -> None:
    side = build(*args)
    connection.send(None)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(side, method)(*arguments))


def timed(step: Callable[[], Step]) -> Turn:
    """Run a step and look at the CPU time of everybody else while it runs."""
    busy, own, wall = _busy_seconds(), time.process_time(), time.perf_counter()
    phases = step()
    own, wall = time.process_time() - own, time.perf_counter() - wall
    others = max(0.0, _busy_seconds() - busy - own)
    return Turn(phases, others, wall * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """CPU time all processes have used; 0 where the system does not say (only Linux does)."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def take_turns(sides: Sequence[Remote], rounds: int, most_others: float) -> list[list[Step]]:
    """`rounds` quiet rounds of `Turn`s from each side's method "turn": a list of steps per side.

    Args:
        most_others: a round counts if others used at most this share of the CPUs during it.

    Raises:
        SystemExit: half the rounds, at least two, were still not quiet after three times as many.
    """
    kept: list[list[Step]] = []
    for number in range(3 * rounds):
        order = range(len(sides)) if number % 2 == 0 else range(len(sides) - 1, -1, -1)
        turns: dict[int, Turn] = {i: sides[i].call("turn") for i in order}
        share = sum(t.others for t in turns.values()) / sum(t.capacity for t in turns.values())
        if share <= most_others:
            kept.append([turns[i].step for i in range(len(sides))])
        if len(kept) == rounds:
            break
    if len(kept) < max(2, math.ceil(rounds / 2)):
        raise SystemExit(
            f"only {len(kept)} of {3 * rounds} rounds were quiet: other programs used more than "
            f"{most_others:.0%} of the CPUs; stop them, or raise --others"
        )
    return [list(steps) for steps in zip(*kept, strict=True)]


def resident_bytes() -> int | None:
    """Memory of this process, from Linux; None elsewhere."""
    _give_back_freed()
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most `resident_bytes` has been since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far."""
    _give_back_freed()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _give_back_freed() -> None:
    """Make glibc let go of what it holds in reserve, which would count as resident."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) * 1024


def machine(device: str) -> dict[str, Any]:
    """Versions and kind of processor, without names of hosts or people."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if device == "cuda" else model,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }


def print_json(benchmark: str, device: str, **content: Any) -> None:
    """The line `run.py` collects."""
    print(json.dumps({"benchmark": benchmark, "device": device, **machine(device), **content}))
