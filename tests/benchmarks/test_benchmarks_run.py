"""The benchmarks compare equal things; how fast they are is nobody's test."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)


def test_both_sides_compute_the_same_step() -> None:
    done = run(
        "contrastive_step.py",
        *("--tiny", "--chunk", "--pairs", "2", "--batch", "4", "--threads", "1", "--others", "1"),
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout.splitlines()[-1])
    assert (content["benchmark"], content["device"], content["precision"]) == (
        "contrastive_step",
        "cpu",
        "fp32",
    )
    chunks = ["ours, 16 pairs", "ours, 16 pairs, chunked"]
    assert [(row["model"], row["side"]) for row in content["results"]] == [
        *(("clip", s) for s in ("open_clip", "ours, padded", "ours, trimmed", *chunks)),
        *(("siglip", s) for s in ("open_clip", "ours, padded", *chunks)),
    ]
    for row in content["results"]:
        assert row["loss_error"] < 1e-5, row
        assert row["grad_error"] < 1e-4, row
        assert row["rounds"] == 2, row
        phases = row["forward"] + row["backward"] + row["optimiser"]
        assert 0 < phases < 2 * row["seconds"], row
        assert row["iqr"][0] <= row["speed"] <= row["iqr"][1], row


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_different_work_is_refused(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parity = importlib.import_module("parity")
    grads = {"weight": torch.tensor([1.0, -2.0]), "bias": torch.tensor([1e-6])}
    save_file(grads, tmp_path / "a")
    save_file({**grads, "bias": factor * grads["bias"]}, tmp_path / "b")
    save_file({"weight": grads["weight"]}, tmp_path / "c")
    a, b, c = (parity.Result(1.0, tmp_path / name) for name in "abc")

    parity.require("same", parity.compare(a, a), 1e-9)
    error = parity.compare(b, a)
    assert error.worst == "bias"
    with pytest.raises(SystemExit, match="the gradient of bias by"):
        parity.require("other", error, 1e-4)
    with pytest.raises(SystemExit, match="nothing is timed"):
        parity.require("other", parity.compare(a._replace(loss=1.01), a), 1e-4)
    with pytest.raises(ValueError, match="only one side has gradients of bias"):
        parity.compare(c, a)


def test_runner_names_its_benchmarks() -> None:
    done = run("run.py", "lodaer")
    assert done.returncode == 2
    assert "no benchmark 'lodaer'; choose from contrastive_step, sigmoid_memory, loader" in (
        done.stderr
    )
