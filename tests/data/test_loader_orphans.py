"""A trainer that is killed leaves no worker of its loader behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TRAINER = """
import sys, time
from multiprocessing import active_children
from torchvision.transforms.functional import pil_to_tensor
from latentmodal.experiments.data.config import LoaderConfig, ShardSourceConfig
from latentmodal.experiments.data.loader import TrainLoader

config = LoaderConfig(batch_size=4, workers=2, shuffle_window=8)
source = ShardSourceConfig(urls=sys.argv[1:])
loader = TrainLoader([source], config, steps=1000, seed=0, image_transform=pil_to_tensor)
batches = iter(loader)
next(batches)
print(*(child.pid for child in active_children()), flush=True)
time.sleep(120)
"""


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a child with its parent")
def test_workers_end_with_a_trainer_that_was_killed(
    make_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *make_shards(2, 8)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2 and all(map(runs, workers))
    trainer.kill()
    trainer.wait()
    # Well before PyTorch's own worker looks for its parent, which is every five seconds.
    until = time.monotonic() + 2
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(runs, workers))
