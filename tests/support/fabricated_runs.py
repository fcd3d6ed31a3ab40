"""Folders that look like those of trained runs, for tests of what compares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from latentmodal.experiments.evaluation.report import EvalReport, Metric
from latentmodal.experiments.evaluation.samples import SAMPLES_FILE, write_samples
from latentmodal.experiments.training.cost import RunCost

BRIDGES = ("average_pool", "resampler", "qformer", "c_abstractor")
TOKENS = ("9", "36")
QUALITY = {"average_pool": 0.9, "resampler": 1.02, "qformer": 0.7, "c_abstractor": 1.2}
STEPS = 300


def fabricate_ablation(folder: Path, seeds: int = 3, samples: bool = False) -> Path:
    """Four bridges x two token budgets: c_abstractor over 36 tokens leads, qformer is far behind.

    Returns:
        The ablation's folder.
    """
    random = np.random.default_rng(0)
    of_seed = 0.05 * random.standard_normal(seeds)
    for bridge in BRIDGES:
        for tokens in TOKENS:
            score = QUALITY[bridge] + (0.04 if tokens == "36" else 0.0)
            for seed in range(seeds):
                cider = score + of_seed[seed] + 0.03 * random.standard_normal()
                run = folder / "cells" / f"bridge={bridge},tokens={tokens}" / f"seed{seed}"
                values = {
                    "CIDEr-D": cider,
                    "names_recall": 0.45 + cider / 4,
                    "CHAIRi": 0.6 - cider / 3,
                }
                size = 40_000 * (1 + BRIDGES.index(bridge)) ** 2
                fabricate_run(
                    run,
                    recipe={
                        "name": "stage2_emoji_quick",
                        "system": {"bridge": {"name": bridge, "num_queries": int(tokens)}},
                        "seed": seed,
                        "run_dir": str(run),
                    },
                    values=values,
                    cost=cost(size, int(tokens), 0.05 + 0.02 * BRIDGES.index(bridge)),
                )
                cell = {
                    "format_version": 1, "ablation": "bridges", "seed": seed,
                    "label": f"bridge={bridge},tokens={tokens}",
                    "axes": {"bridge": bridge, "tokens": tokens},
                }  # fmt: skip
                (run / "cell.json").write_text(json.dumps(cell))
                if samples:
                    leave_samples(run, bridge)
    plan = {
        "name": "bridges", "base": "blip2/stage2_emoji_quick", "budget": {"steps": STEPS},
        "metrics": ["pairs/CIDEr-D", "pairs/names_recall", "pairs/CHAIRi"],
        "against": {"bridge": "average_pool", "tokens": 9},
    }  # fmt: skip
    (folder / "ablation.yaml").write_text(yaml.safe_dump(plan))
    return folder


def fabricate_run(
    folder: Path,
    *,
    recipe: Mapping[str, Any],
    values: Mapping[str, float | None],
    cost: RunCost | None = None,
) -> Path:
    """One finished run whose metrics of the task `pairs` rise to `values`."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    (folder / "finished.json").write_text(json.dumps({"step": STEPS}))
    for share, file in (
        (0.3, "evaluations/step=00000100.json"),
        (0.8, "evaluations/step=00000200.json"),
        (1.0, "eval.json"),
    ):
        section = {
            name: Metric(
                value=None if value is None else share * value,
                n=200,
                protocol="200 pictures of unseen pairs",
                unit="score" if name == "CIDEr-D" else "share",
            )
            for name, value in values.items()
        }
        step = {"step": STEPS} if share == 1.0 else {}
        EvalReport(sections={"pairs": section}, context=step).write_json(folder / file)
    if cost is not None:
        cost.write(folder / "cost.json")
    return folder


def cost(trainable: int, tokens: int, step_seconds: float) -> RunCost:
    """The cost of a run of `STEPS` steps."""
    return RunCost(
        trainable_parameters=trainable,
        total_parameters=trainable + 1_000_000,
        steps=STEPS,
        samples=STEPS * 32,
        tokens=STEPS * 32 * (tokens + 12),
        train_seconds=STEPS * step_seconds,
        step_seconds=step_seconds,
        peak_memory_bytes=600 * 2**20,
    )


def leave_samples(run: Path, bridge: str) -> None:
    """Captions of three pictures, as the last evaluation leaves them."""
    pixels = torch.arange(3 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(3, 3, 32, 32)
    truth = [["a red <apple>", "an apple"], ["a blue kite over a tree"], ["two cats"]]
    said = [f"what {bridge} says of picture {row}" for row in range(3)]
    write_samples(run / SAMPLES_FILE, list(pixels), truth, said)
