"""An equal budget is a number of steps, out of costs that were measured on real batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip2_recipes import LANGUAGE_MODEL
from latentmodal.experiments.ablation.budget import steps_for
from latentmodal.experiments.ablation.config import BudgetConfig, read_ablation
from latentmodal.experiments.ablation.costs import CellCost, CostFile, measure
from latentmodal.experiments.ablation.expand import expand
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.training.cost import RunCost
from latentmodal.experiments.training.fit import fit

COST = CellCost(
    trainable_parameters=10,
    total_parameters=20,
    samples_per_step=8,
    tokens_per_step=100.0,
    step_seconds=0.25,
    flops_per_step=4_000_000,
)
SPEAKING = """
base: blip2/stage2_emoji
system:
  image_encoder:
    name: timm
    model: resnet10t
    image_size: 48
    model_kwargs: {channels: [8, 8, 16, 32], stem_width: 8, output_stride: 16}
  bridge: {width: 32, layers: 1, mlp_dim: 32, heads: 2, num_input_positions: 9}
  llm: {name: causal, gguf: null, model: RUNS/lm/llm}
  pretrained: null
  generation: {max_new_tokens: 3}
data:
  train: [{name: emoji, preset: tiny}]
  loader: {batch_size: 8, workers: 0, shuffle_window: 16}
trainer: {log_every: 1}
evaluation:
  at_start: false
  tasks: {unseen_pairs: {source: {preset: tiny}, baseline: {preset: tiny}}}
"""
AXES = """
name: speaking
base: speaking.yaml
recipe: {data: {features: auto}}
axes:
  bridge:
    mlp:
      freeze: {"bridge.proj.*": null}
      system: {bridge: {name: mlp}}
    qformer: {system: {bridge: {num_queries: 2}}}
seeds: [0]
budget: {tokens: 1200}
metrics: [unseen_pairs/names_recall]
"""


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (BudgetConfig(steps=7), 7),
        (BudgetConfig(samples=84), 10),  # 10.5 steps
        (BudgetConfig(samples=85), 11),
        (BudgetConfig(tokens=1049), 10),
        (BudgetConfig(seconds=5.0), 20),
        (BudgetConfig(flops=4.2e7), 10),
    ],
)
def test_each_measure_becomes_steps(budget: BudgetConfig, steps: int) -> None:
    assert steps_for(budget, COST, "a=b") == steps


def test_a_budget_that_cannot_be_held_is_refused() -> None:
    silent = dataclasses.replace(COST, tokens_per_step=None)
    with pytest.raises(UserError, match="no language model whose tokens could be counted"):
        steps_for(BudgetConfig(tokens=1000), silent, "a=b")
    with pytest.raises(UserError, match=r"budget.samples: 3 is less .* cell a=b, which takes 8"):
        steps_for(BudgetConfig(samples=3), COST, "a=b")


def test_costs_are_kept_for_the_recipe_they_are_of(tmp_path: Path) -> None:
    file = CostFile(tmp_path / "costs.json")
    assert file.costs({"a": "1"}) == {}
    file.put("a", "1", COST)
    file.put("b", "2", "no such data")
    assert file.costs({"a": "1", "b": "2"}) == {"a": COST}
    assert file.costs({"a": "other"}) == {}
    assert file.reasons() == {"b": "no such data"}
    file.path.write_text('{"format_version": 9}')
    with pytest.raises(UserError, match="is not of format 1; remove it"):
        file.read()


def test_a_measurement_counts_what_a_step_computes(ablation_file: Path, tmp_path: Path) -> None:
    (cell, _) = expand(read_ablation(str(ablation_file))).cells
    recipe = cell.recipe(0, tmp_path / "run")
    cost = measure(recipe)
    assert cost.samples_per_step == 8
    assert cost.tokens_per_step is None
    assert cost.step_seconds > 0
    assert cost.trainable_parameters == cost.total_parameters
    assert cost.flops_per_step == measure(recipe).flops_per_step
    twice = dataclasses.replace(
        recipe,
        data=dataclasses.replace(
            recipe.data, loader=dataclasses.replace(recipe.data.loader, batch_size=16)
        ),
    )
    # All of it is linear in the batch but the similarities, which are few beside the towers.
    assert measure(twice).flops_per_step == pytest.approx(2 * cost.flops_per_step, rel=0.02)
    assert not (tmp_path / "run").exists()


def test_products_count_two_operations_forward_and_four_backward() -> None:
    """The counter's convention, which `flops_per_step` states."""
    weight_DE = torch.randn(4, 5, requires_grad=True)
    x_BD = torch.randn(3, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x_BD @ weight_DE).sum().backward()
    assert counter.get_total_flops() == 6 * 3 * 4 * 5


def test_tokens_are_equal_and_features_shared(
    tmp_path: Path,
    emoji_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    ablate: Callable[..., Any],
) -> None:
    monkeypatch.setenv("LATENTMODAL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "emoji").symlink_to(emoji_cache / "emoji")
    for name, text in (("lm", LANGUAGE_MODEL), ("speaking", SPEAKING), ("ablation", AXES)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("RUNS", str(tmp_path)))
    from rich.console import Console

    fit(load_recipe(str(tmp_path / "lm.yaml")), resume=False, console=Console(quiet=True))
    failed, _ = ablate(tmp_path / "ablation.yaml", f"folder={tmp_path}/out")
    assert not failed
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
    cells = sorted((tmp_path / "out" / "cells").iterdir())
    costs = [RunCost.read(cell / "seed0" / "cost.json") for cell in cells]
    assert [cell.name for cell in cells] == ["bridge=mlp", "bridge=qformer"]
    # 9 soft tokens or 2 beside the text: fewer tokens a step, more steps.
    assert costs[1].steps > costs[0].steps * 1.2
    for cost in costs:
        assert cost.tokens == pytest.approx(1200, rel=0.1)
    measured = json.loads((tmp_path / "out" / "costs.json").read_text())["cells"]
    for cell, cost in zip(cells, costs, strict=True):
        per_step = measured[cell.name]["cost"]["tokens_per_step"]
        assert cost.tokens is not None
        assert cost.tokens / cost.steps == pytest.approx(per_step, rel=0.1)
