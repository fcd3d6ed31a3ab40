"""Who runs the jobs: processes on this machine, SLURM through submitit, or Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from latentmodal.experiments.ablation.config import WorkersConfig
from latentmodal.experiments.ablation.job import PARENT
from latentmodal.experiments.errors import UserError

LOG_FILE = "log.txt"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 20.0
"""For a run to write a checkpoint before it is killed."""
_TIMEOUT_MINUTES = 24 * 60
"""Of a submitted job; submitit's own five are none for training."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process: what `job` is to do in which folder; its output goes to `log.txt` there.

    Paths are relative to `cwd`, wherever the process runs.
    """

    kind: str
    folder: Path
    cwd: Path = field(default_factory=Path.cwd)


class Engine(Protocol):
    """Starts tasks, says when they are done, and stops them."""

    def start(self, task: Task) -> Any:
        """Start it; returns a handle."""

    def exit_code(self, handle: Any) -> int | None:
        """Of a task that has ended, negative where a signal ended it; None while it runs."""

    def stop(self, handles: Sequence[Any]) -> None:
        """End what runs, with time for a checkpoint where there can be."""


def run_tasks(
    engine: Engine, tasks: Sequence[Task], count: int, ended: Callable[[Task, int], None]
) -> None:
    """Run every task, `count` at a time, and call `ended(task, exit code)` after each.

    Whatever interrupts it also ends the tasks that run.
    """
    waiting, running = list(tasks), list[tuple[Task, Any]]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                task = waiting.pop(0)
                running.append((task, engine.start(task)))
            for entry in list(running):
                code = engine.exit_code(entry[1])
                if code is not None:
                    running.remove(entry)
                    ended(entry[0], code)
            time.sleep(_POLL_SECONDS)
    finally:
        if running:
            engine.stop([handle for _, handle in running])


def build_engine(config: WorkersConfig, folder: Path) -> Engine:
    """The engine of a configuration; `folder` keeps its own files.

    Raises:
        UserError: its package is not installed.
    """
    if config.engine == "local":
        return LocalEngine(config.threads)
    if find_spec(config.engine) is None:
        raise UserError(
            f"workers.engine: {config.engine} is not installed; pip install {config.engine}, "
            "or use engine local"
        )
    if config.engine == "submitit":
        return SubmititEngine(config, folder / "submitit")
    return RayEngine(config)


def start_process(task: Task, threads: int) -> subprocess.Popen[bytes]:
    """The process of a task, in a session of its own, so that Ctrl-C reaches it through us."""
    command = [sys.executable, "-m", "latentmodal.experiments.ablation.job"]
    command += [task.kind, str(task.folder), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    folder = task.cwd / task.folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=task.cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def run_process(task: Task, threads: int) -> int:
    """Run a task to its end, on the machine an engine chose; returns the exit code."""
    process = start_process(task, threads)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            _end([process])


class LocalEngine:
    """Processes on this machine."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def start(self, task: Task) -> subprocess.Popen[bytes]:
        return start_process(task, self.threads)

    def exit_code(self, handle: subprocess.Popen[bytes]) -> int | None:
        return handle.poll()

    def stop(self, handles: Sequence[subprocess.Popen[bytes]]) -> None:
        _end(handles)


class SubmititEngine:
    """Jobs of submitit; `options.cluster` is slurm, local or debug, found by itself if not given.

    A submitted job outlives an ablation that is killed; one submitted again waits for it.
    """

    def __init__(self, config: WorkersConfig, folder: Path) -> None:
        import submitit

        options = dict(config.options)
        self.threads = config.threads
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=options.pop("cluster", None))
            self.executor.update_parameters(
                **{
                    "name": "latentmodal-ablate",
                    "cpus_per_task": config.threads,
                    "timeout_min": _TIMEOUT_MINUTES,
                    **options,
                }
            )
        except (ValueError, TypeError, NameError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"workers.options: submitit refuses them ({first})") from error

    def start(self, task: Task) -> Any:
        return self.executor.submit(run_process, task, self.threads)

    def exit_code(self, handle: Any) -> int | None:
        import submitit.core.utils

        if not handle.done():
            return None
        try:
            return int(handle.result())
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
            return 1

    def stop(self, handles: Sequence[Any]) -> None:
        for handle in handles:
            handle.cancel()


class RayEngine:
    """Ray's remote functions, on the cluster of RAY_ADDRESS or on this machine."""

    def __init__(self, config: WorkersConfig) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        self.threads = config.threads
        options = {"num_cpus": config.threads, "max_retries": 0, **config.options}
        try:
            self.remote = ray.remote(**options)(run_process)
        except (ValueError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"workers.options: ray refuses them ({first})") from error

    def start(self, task: Task) -> Any:
        return self.remote.remote(task, self.threads)

    def exit_code(self, handle: Any) -> int | None:
        import ray

        if not ray.wait([handle], timeout=0)[0]:
            return None
        try:
            return int(ray.get(handle))
        except ray.exceptions.RayError:
            return 1

    def stop(self, handles: Sequence[Any]) -> None:
        import ray

        for handle in handles:
            ray.cancel(handle, force=True)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, time to write a checkpoint, then SIGKILL to them and to what they started."""
    try:
        for process in processes:
            process.terminate()
        until = time.monotonic() + _GRACE_SECONDS
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
