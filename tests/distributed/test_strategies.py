"""`ddp` and `fsdp` on two processes against one process: loss curve and updated parameters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("strategy_cases.py")
PAIRS = [
    (case, mode)
    for case in (
        "info_nce", "sigmoid", "locked", "chunked", "matched",
        "alignment", "alignment_matched", "alignment_itm_only", "alignment_itg_only",
        "alignment_no_itm",
        "generation", "generation_bf16", "generation_t5", "generation_projection",
    )
    for mode in ("ddp", "fsdp")
    if (case, mode) != ("chunked", "fsdp")
]  # fmt: skip


def run_ranks(out: Path, world: int) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), str(world), str(rank), str(port)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "".join(errors)[-3000:]
    results: dict[str, Any] = torch.load(out, weights_only=True)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses and parameters by `case-mode`, of one rank and of two."""
    folder = tmp_path_factory.mktemp("strategies")
    return {**run_ranks(folder / "one.pt", 1), **run_ranks(folder / "two.pt", 2)}


@pytest.mark.parametrize(("case", "mode"), PAIRS)
def test_two_ranks_train_as_one(results: dict[str, Any], case: str, mode: str) -> None:
    losses, state, said = results[f"{case}-{mode}"]
    expected_losses, expected_state, expected_said = results[f"{case}-single"]
    # A frozen model in bfloat16 rounds its third digit, in other places for another batch.
    exact = 1e-3 if case == "generation_bf16" else 2e-5
    assert losses == pytest.approx(expected_losses, abs=exact)
    assert losses[0] != pytest.approx(losses[-1], abs=1e-5), "nothing was learned"
    assert said == expected_said
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, atol=exact, rtol=1e-4, msg=name)


def test_locked_tower_is_not_saved(results: dict[str, Any]) -> None:
    for mode in ("single", "ddp", "fsdp"):
        assert not [name for name in results[f"locked-{mode}"][1] if "image_encoder" in name]
