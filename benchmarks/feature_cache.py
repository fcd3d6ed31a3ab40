"""Training from cached features against training from pixels: the same recipe, system and batches.

    python benchmarks/feature_cache.py blip2/stage2_emoji_quick --folder FEATURES [KEY=VALUE ...]

`--folder` is what `latentmodal cache` wrote for the same recipe and overrides. Both sides live in
one process, without loader workers, so that every bit of work is on the clock: read a batch, loss,
gradients, optimiser step. They take turns of a few steps (A B B A ...), and what is reported is the
median of the ratios of neighbours with its quartiles: of the whole step, and of reading alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from turns import Summary

from latentmodal.experiments.data.collate import Batch
from latentmodal.experiments.data.loader import TrainLoader
from latentmodal.experiments.data.module import resolve_source
from latentmodal.experiments.feature_cache.opening import open_features
from latentmodal.experiments.recipe import load_recipe
from latentmodal.experiments.schema import Recipe
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.run_folder import RunFolder


class Seconds(NamedTuple):
    """Of one turn."""

    reading: float
    step: float
    """Reading included."""


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a recipe whose image tower is frozen")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", required=True, help="its features")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of turns")
    return parser.parse_args()


class Side:
    """A system, its optimiser and its batches, from pixels or from features."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        with tempfile.TemporaryDirectory() as scratch:
            self._system = build_system(recipe, RunFolder(Path(scratch)))
        self._system.train()
        trainable = [p for p in self._system.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        loader = TrainLoader(
            [resolve_source(source) for source in recipe.data.train],
            dataclasses.replace(recipe.data.loader, workers=0, shuffle_window=100),
            steps=recipe.trainer.max_steps,
            seed=recipe.seed,
            image_transform=self._system.image_transform(recipe.data.augment),
            text_transform=self._system.text_transform,
            prompt_transform=self._system.prompt_transform,
            features=open_features(recipe, self._system),
            rank=0,
            world_size=1,
        )
        self._batches: Iterator[Batch] = iter(loader)
        self.losses: list[float] = []

    def turn(self, steps: int) -> Seconds:
        """Trains `steps` steps."""
        reading, start = 0.0, time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(self._batches)
            reading += time.perf_counter() - before
            loss = self._loss(batch)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.losses.append(loss.item())
        return Seconds(reading, time.perf_counter() - start)

    def _loss(self, batch: Batch) -> torch.Tensor:
        system: Any = self._system
        features_BND = system.cached_features(batch)
        if batch.prompts is not None:
            loss: torch.Tensor = system.model(batch.pixels_BCHW, batch.prompts, features_BND)
            return loss
        targets, texts = batch.num_text_tokens - len(batch), batch.text
        total: torch.Tensor = system.model(
            *(batch.pixels_BCHW, texts.ids_BT, texts.mask_BT, batch.image_ids_B, targets, 0),
            features_BND,
        ).total
        return total


def main() -> None:
    """Measures and prints; the last line is JSON."""
    args = parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pixels = Side(load_recipe(args.recipe, args.overrides))
    cached = Side(load_recipe(args.recipe, [*args.overrides, f"data.features={args.folder}"]))
    for side in (pixels, cached):
        side.turn(1)
    ratios: dict[str, list[float]] = {"step": [], "reading": []}
    seconds: dict[str, list[float]] = {"pixels": [], "cached": []}
    for pair in range(args.pairs):
        order = (pixels, cached) if pair % 2 == 0 else (cached, pixels)
        turns = {id(side): side.turn(args.steps) for side in order}
        slow, fast = turns[id(pixels)], turns[id(cached)]
        ratios["step"].append(slow.step / fast.step)
        ratios["reading"].append(slow.reading / fast.reading)
        seconds["pixels"].append(slow.step / args.steps)
        seconds["cached"].append(fast.step / args.steps)
    apart = max(abs(a - b) / abs(a) for a, b in zip(pixels.losses, cached.losses, strict=True))
    result: dict[str, Any] = {"benchmark": "feature_cache", "recipe": args.recipe}
    for name, values in ratios.items():
        summary = Summary.of(values)
        result[name] = summary._asdict()
        print(f"{name:8} {summary.median:6.2f} x  ({summary.low:.2f} .. {summary.high:.2f})")
    for name, values in seconds.items():
        result[f"{name}_seconds"] = Summary.of(values).median
        print(f"{name:8} {result[f'{name}_seconds']:6.3f} s a step")
    result["losses_apart"] = apart
    print(f"losses agree to {apart:.1e}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
