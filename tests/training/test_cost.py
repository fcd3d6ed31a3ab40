"""What a run cost is counted once, however often it was interrupted, evaluations left out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentmodal.experiments.data.collate import Batch, TextTensors
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.systems.base import System
from latentmodal.experiments.training.cost import CostMeter, RunCost
from latentmodal.llm import IGNORE_INDEX, PromptBatch, Seq2SeqBatch


def test_cost_of_a_run(finished_run: Path) -> None:
    cost = RunCost.read(finished_run / "cost.json")

    assert (cost.steps, cost.tokens) == (6, None)
    assert cost.samples > 0 and cost.samples % 6 == 0
    assert 0 < cost.trainable_parameters <= cost.total_parameters
    assert 0 < cost.step_seconds <= cost.train_seconds
    assert cost.peak_memory_bytes > 50_000_000


def test_a_resumed_run_counts_nothing_twice(fit: Callable[..., str], finished_run: Path) -> None:
    whole = RunCost.read(finished_run / "cost.json")
    for name in ("finished.json", "eval.json", "cost.json"):
        (finished_run / name).unlink()
    for file in (finished_run / "checkpoints").glob("step=00000006*"):
        file.unlink()
    shutil.rmtree(finished_run / "evaluations", ignore_errors=True)

    fit(f"run_dir={finished_run}", resume=True)

    again = RunCost.read(finished_run / "cost.json")
    counts = ("steps", "samples", "tokens", "trainable_parameters", "total_parameters")
    assert [getattr(again, name) for name in counts] == [getattr(whole, name) for name in counts]


def test_the_format_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"cost\.json: is not of format 1; train that run again"):
        RunCost.read(path)


class Counting(torch.nn.Module):
    """A system as the meter sees it."""

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens

    def count_tokens(self, batch: Batch) -> torch.Tensor | None:
        return None if self.tokens is None else torch.tensor(self.tokens)


def batch(size: int, prompts: Any = None) -> Batch:
    empty = torch.zeros(size, 0, dtype=torch.int64)
    return Batch(
        pixels_BCHW=torch.zeros(size, 3, 0, 0),
        text=TextTensors(empty, empty.bool()),
        keys=["key"] * size,
        captions=[""] * size,
        all_captions=[[]] * size,
        meta=[{}] * size,
        index_B=torch.zeros(size),
        prompts=prompts,
    )


def test_time_of_an_evaluation_is_left_out() -> None:
    meter, trainer, system = CostMeter(), SimpleNamespace(world_size=2), Counting(7)
    meter.on_train_start(trainer, system)
    for step in range(3):
        time.sleep(0.02)
        if step == 1:  # as an evaluation between two steps does
            time.sleep(0.5)
            meter.pause(0.5)
        meter.on_train_batch_end(trainer, system, None, batch(4), step)

    cost = meter.cost(trainer, system)

    assert 0.06 <= cost.train_seconds < 0.4
    assert (cost.steps, cost.samples, cost.tokens) == (3, 24, 42)


def test_state_goes_on_in_another_process() -> None:
    trainer = SimpleNamespace(world_size=1)
    first, second = CostMeter(), CostMeter()
    for meter in (first, second):
        meter.on_train_start(trainer, Counting(5))
    first.on_train_batch_end(trainer, Counting(5), None, batch(2), 0)
    second.load_state_dict(first.state_dict())
    second.on_train_batch_end(trainer, Counting(5), None, batch(2), 1)

    cost = second.cost(trainer, Counting(5))

    assert (cost.steps, cost.samples, cost.tokens) == (2, 4, 10)
    assert cost.train_seconds >= first.seconds > 0


def test_without_a_language_model_there_are_no_tokens() -> None:
    meter, trainer = CostMeter(), SimpleNamespace(world_size=1)
    meter.on_train_start(trainer, Counting(None))
    meter.on_train_batch_end(trainer, Counting(None), None, batch(2), 0)
    assert meter.cost(trainer, Counting(None)).tokens is None
    assert meter.state_dict()["tokens"] is None


def test_tokens_are_those_that_are_no_padding() -> None:
    mask_BT = torch.tensor([[True, True, True, False], [True, True, True, True]])
    ids_BT = torch.zeros(2, 4, dtype=torch.int64)
    shared: dict[str, Any] = {
        "ids_BT": ids_BT,
        "mask_BT": mask_BT,
        "slot_mask_BT": torch.zeros_like(mask_BT),
        "slot_counts": [0, 0],
        "image_counts": [0, 0],
        "num_targets": 3,
    }
    causal = PromptBatch(**shared, labels_BT=ids_BT)
    labels_BS = torch.tensor([[5, 6], [7, IGNORE_INDEX]])
    both = Seq2SeqBatch(**shared, labels_BS=labels_BS, is_padded=True)
    count = System.count_tokens

    assert count(None, batch(2, causal)) == 7  # type: ignore[arg-type]
    assert count(None, batch(2, both)) == 10  # type: ignore[arg-type]
    assert count(None, batch(2)) is None  # type: ignore[arg-type]
