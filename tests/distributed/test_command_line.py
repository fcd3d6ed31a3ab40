"""`latentmodal fit` on two processes: trains, evaluates, and resumes as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentmodal.experiments.training.checkpoints import digest_path

STEPS = 6


def final_state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(run / f"checkpoints/step={STEPS:08d}.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_ranks_resume_exactly(
    latentmodal, tiny_recipe: Path, tmp_path: Path, parallelism: str
) -> None:
    run = tmp_path / "run"
    keys = ("trainer.devices=2", f"trainer.parallelism={parallelism}", "resume=true")
    done = latentmodal("fit", str(tiny_recipe), *keys)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((run / "eval.json").read_text())
    assert report["sections"]["naming_seen_styles"]["acc1"]["n"] == 36  # no picture twice
    whole = final_state(run)

    last = run / f"checkpoints/step={STEPS:08d}.ckpt"
    for lost in (last, digest_path(last), run / "finished.json"):  # as a kill at step 5 leaves it
        lost.unlink()
    done = latentmodal("fit", str(tiny_recipe), *keys)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout
    again = final_state(run)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
