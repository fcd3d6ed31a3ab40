import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What rank_cases.py found: {world: {case: values}}, world 1 being the reference."""
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    script = Path(__file__).with_name("rank_cases.py")
    done = subprocess.run(
        [sys.executable, script, out],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)
