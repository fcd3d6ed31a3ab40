"""The benchmark of MiniGPT-4's first stage compares equal things; speed is nobody's test."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = 5


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def setup(here: None, tmp_path: Path) -> Any:
    script = importlib.import_module("projection_step")
    args = argparse.Namespace(tiny=True, size="small", device="cpu", threads=1)
    return script.make_setup(args, tmp_path)


@pytest.mark.parametrize("images", ["features", "pixels"])
def test_sides_do_equal_work_and_ours_keeps_less(images: str, setup: Any, tmp_path: Path) -> None:
    script = importlib.import_module("projection_step")
    sides = importlib.import_module("projection_sides")
    parity = importlib.import_module("parity")
    for number, together in enumerate(script.comparisons(BATCH, [images])):
        steps = [sides.ProjectionStep(setup, side) for side in together]
        results = [step.parity(str(tmp_path / f"{number}-{i}")) for i, step in enumerate(steps)]
        expected = load_file(results[0].gradients)
        assert expected.keys() == {"weight", "bias"}
        assert all(grad.abs().max() > 1e-6 for grad in expected.values())
        for result in results[1:]:
            error = parity.compare(result, results[0])
            assert error.loss < 1e-5
            assert error.gradient < 1e-4, error
        kept = [step.kept() for step in steps]
        assert all(0 < ours < kept[0] for ours in kept[1:])
        for step in steps:
            before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
            step.step()
            changed = {
                name
                for name, p in step.model.named_parameters()
                if not torch.equal(p, before[name])
            }
            assert len(changed) == 2, changed  # the projection's weight and bias


def test_useful_work_counts_no_padding(setup: Any) -> None:
    script = importlib.import_module("projection_step")
    sides = importlib.import_module("projection_sides")
    texts = sides.draw_texts(setup, BATCH)
    assert len(set(map(len, texts))) > 1
    tokens, flops = script.useful_work(setup, BATCH)
    labels = sum(map(len, texts))
    assert tokens == BATCH * (1 + setup.shape.num_queries) + labels
    model = sides.PlainMiniGPT4(setup, False).llm
    head = model.lm_head.weight.numel()
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert flops == 4 * (matrices * tokens + head * labels)
