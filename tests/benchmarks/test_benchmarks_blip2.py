"""The BLIP-2 benchmarks compare equal things, and count what they say; speed is nobody's test."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDES = ("transformers, padded", "ours, padded", "ours, trimmed")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def assert_equal_work(steps: list[Any], folder: Path) -> None:
    """The same loss and gradients as the first, and the fewer bytes kept the later in the list."""
    parity = importlib.import_module("parity")
    results = [step.parity(str(folder / f"{i}")) for i, step in enumerate(steps)]
    for result in results[1:]:
        error = parity.compare(result, results[0])
        assert error.loss < 1e-5
        assert error.gradient < 1e-4, error
    kept = [step.kept() for step in steps]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


def assert_trains(step: Any) -> None:
    """One step changes what trains, and nothing else."""
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.step()
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.usefixtures("here")
def test_first_stage_is_equal_work(tmp_path: Path) -> None:
    inputs = importlib.import_module("bridge_inputs")
    sides = importlib.import_module("qformer_sides")
    setup = sides.Setup(
        shape=inputs.TINY, device="cpu", threads=1, weights=str(tmp_path / "weights")
    )
    sides.write_weights(setup)
    rows = [
        sides.Side(name=name, library=name.split(",")[0], batch=5, tokens=name.split()[-1])
        for name in SIDES
    ]
    steps = [sides.AlignmentStep(setup, side) for side in rows]
    assert_equal_work(steps, tmp_path)
    for step in steps:
        assert_trains(step)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("llm", ["opt", "llama"])
def test_second_stage_is_equal_work(llm: str, tmp_path: Path) -> None:
    inputs = importlib.import_module("bridge_inputs")
    sides = importlib.import_module("generation_sides")
    script = importlib.import_module("generation_step")
    setup = sides.Setup(
        shape=inputs.TINY,
        llm=script.language_model(llm, "tiny", None),
        device="cpu",
        threads=1,
        weights=str(tmp_path / "weights"),
    )
    sides.write_weights(setup)
    for number, together in enumerate(script.comparisons(5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        steps = [sides.GenerationStep(setup, side) for side in together]
        assert_equal_work(steps, folder)
        for step in steps:
            assert_trains(step)


def test_traffic_is_what_the_shapes_say() -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "itm_traffic.py")),
            *("--batch", "6", "--tokens", "65", "--width", "64"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["results"]
    row = 4 * 65 * 64
    assert found["gather"]["shapes"] == 2 * 6 * row
    assert 0 < found["fetch"]["shapes"] < found["gather"]["shapes"]
    if found["gather"]["forward"] is None:
        pytest.skip("this system does not count a connection's bytes")
    for way in ("gather", "fetch"):
        assert found[way]["forward"] == pytest.approx(found[way]["shapes"] / 2, rel=0.05, abs=2000)
    assert found["fetch"]["backward"] < found["gather"]["backward"]


@pytest.mark.usefixtures("here")
def test_kept_bytes_leaves_out_what_is_there_anyway() -> None:
    memory = importlib.import_module("memory")
    a, b = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    assert memory.kept_bytes(lambda: (a * b).sum(), (a, b)) == 0
    assert memory.kept_bytes(lambda: (a * b).sum(), (a,)) == 256
    assert memory.kept_bytes(lambda: (a.exp() * b).sum(), (a, b)) == 256
