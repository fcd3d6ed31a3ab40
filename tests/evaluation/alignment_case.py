"""A tiny alignment system and a tiny set; run as a script it evaluates them on several ranks.

Usage: alignment_case.py FOLDER OUT WORLD RANK PORT
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from latentmodal.encoders import TimmImageConfig, WordTokenizerConfig, train_word_tokenizer
from latentmodal.experiments.data.config import ShardSourceConfig
from latentmodal.experiments.data.shard_writer import write_shards
from latentmodal.experiments.evaluation.run import Evaluator
from latentmodal.experiments.evaluation.tasks import (
    EvaluationConfig,
    ItmRetrievalTask,
    RetrievalTask,
    ToldApartTask,
)
from latentmodal.experiments.systems.alignment import AlignmentConfig, AlignmentSystem
from latentmodal.experiments.systems.alignment_model import ObjectiveWeights
from latentmodal.experiments.systems.parts import BRIDGE_CHOICES
from latentmodal.experiments.training.config import OptimConfig, TrainerConfig
from latentmodal.experiments.training.freeze import FreezePlan

PICTURES = 11
COLOURS = ["red", "green", "blue", "pink", "grey", "black", "white", "brown", "teal", "gold", "tan"]


def caption(row: int, other: int) -> str:
    return f"a {COLOURS[row % 11]} thing on a {COLOURS[other % 11]} one"


def write_set(folder: Path) -> None:
    """Eleven pictures of one to three captions each, most with a false one, and a tokenizer."""
    random = np.random.default_rng(0)
    samples: list[dict[str, Any]] = []
    for row in range(PICTURES):
        coarse_HWC = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse_HWC).resize((32, 32), Image.Resampling.NEAREST).save(buffer, "PNG")
        meta = {
            "captions": [caption(row, row + shift) for shift in range(1, 2 + row % 3)],
            "negatives": {"relation_swap": caption(row + 1, row) if row % 4 else None},
        }
        samples.append({"__key__": f"{row:02d}", "png": buffer.getvalue(), "json": meta})
    write_shards(samples, folder / "shards")
    train_word_tokenizer(
        [caption(row, row + 1) for row in range(PICTURES)], folder / "tokenizer.json"
    )


def build_system(folder: Path, **objectives: float) -> AlignmentSystem:
    """A system whose weights are large enough for its scores to differ."""
    torch.manual_seed(0)
    config = AlignmentConfig(
        image_encoder=TimmImageConfig(
            model="vit_tiny_patch16_224",
            image_size=32,
            model_kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
        ),
        bridge=BRIDGE_CHOICES["qformer"](
            num_queries=3, width=16, layers=2, heads=2, mlp_dim=32, max_positions=16
        ),
        tokenizer=None,
        embed_dim=8,
        objectives=ObjectiveWeights(**objectives),
    )
    tokenizer = WordTokenizerConfig(path=str(folder), context_length=12).build()
    plan = FreezePlan({"image_encoder.*": "frozen"})
    system = config.build(
        plan, OptimConfig(), TrainerConfig(max_steps=1, accelerator="cpu"), tokenizer
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in system.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4, generator=generator)
    return system.eval()


def tasks(folder: Path) -> EvaluationConfig:
    source = ShardSourceConfig(urls=str(folder / "shards"))
    return EvaluationConfig(
        batch_size=4,
        tasks={
            "itc": RetrievalTask(source=source, ks=(1, 2, 5)),
            "itm": ItmRetrievalTask(source=source, ks=(1, 2, 5), top_k=4),
            "by_itm": ToldApartTask(source=source, negatives=("relation_swap",), by="itm"),
            "by_itg": ToldApartTask(source=source, negatives=("relation_swap",), by="itg"),
        },
    )


def evaluate(folder: Path) -> dict[str, Any]:
    """Every metric by name, and how often this rank called the matching model."""
    system = build_system(folder)
    calls = []
    score = system.match_scores

    def counted(features: torch.Tensor, captions: list[str]) -> torch.Tensor:
        calls.append(len(captions))
        return score(features, captions)

    system.match_scores = counted  # type: ignore[method-assign]
    report = Evaluator(tasks(folder), system, {}).run(0)
    values = {
        f"{section}/{name}": metric.value
        for section, metrics in report.sections.items()
        for name, metric in metrics.items()
    }
    return {"values": values, "calls": len(calls), "longest": max(calls)}


def main(folder: Path, out: Path, world: int, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    (out / f"{rank}.json").write_text(json.dumps(evaluate(folder)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
