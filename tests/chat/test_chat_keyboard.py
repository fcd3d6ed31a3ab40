"""`latentmodal chat` at a terminal: what a person's keys do to it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """The far end of a process's terminal."""

    def __init__(self, command: list[str]) -> None:
        self.handle, near = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=near,
            stdout=near,
            stderr=near,
            preexec_fn=take_terminal,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(near)
        self.shown = ""

    def press(self, keys: bytes) -> None:
        os.write(self.handle, keys)

    def until(self, seen: Callable[[str], bool], seconds: float = 90) -> str:
        """What is shown from here on until it is as wanted."""
        start, end = len(self.shown), time.monotonic() + seconds
        while not seen(self.shown[start:]):
            assert time.monotonic() < end, self.shown
            if select.select([self.handle], [], [], 0.1)[0]:
                self.shown += os.read(self.handle, 65536).decode()
        return self.shown[start:]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.handle)


def take_terminal() -> None:
    """Be what its keys reach, as a shell makes the command that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts behind it would ignore it
    os.setsid()
    os.close(os.open(os.ttyname(0), os.O_RDWR))


@pytest.fixture
def terminal(tiny_runs: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "latentmodal.experiments.cli", "chat"]
    found = Terminal([*command, str(tiny_runs / "talks"), "--max-new-tokens", "2000"])
    yield found
    found.close()


def test_ctrl_c_stops_an_answer_or_clears_a_line_and_ctrl_d_ends(terminal: Terminal) -> None:
    def prompted(text: str) -> bool:
        return text.endswith("> ")

    terminal.until(prompted)
    terminal.press(b"Hello\n")
    terminal.until(lambda text: len(text.partition("\n")[2]) > 20)  # it speaks
    terminal.press(CTRL_C)
    assert "[stopped]" in terminal.until(prompted)
    terminal.press(b"/nonsense")
    terminal.until(lambda text: "nonsense" in text)
    time.sleep(1)  # readline takes a Ctrl-C while it waits, not while it shows the last letter
    terminal.press(CTRL_C)
    terminal.until(prompted)
    terminal.press(b"/settings\n")  # the half line before it is gone
    said = terminal.until(prompted)
    assert "max_new_tokens: 2000" in said and "error" not in said
    terminal.press(CTRL_D)
    assert terminal.process.wait(timeout=30) == 0
    assert "Traceback" not in terminal.shown
