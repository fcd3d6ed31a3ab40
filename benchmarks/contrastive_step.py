"""One training step of CLIP ViT-B/32 or SigLIP ViT-B/16: ours against open_clip's.

    python benchmarks/contrastive_step.py --model clip siglip --batch 8 --pairs 10
    python benchmarks/contrastive_step.py --model siglip --device cuda --batch 256 --compile

Ours starts from open_clip's random weights. Losses and all gradients are compared first, in fp32;
beyond `--tolerance` nothing is timed. Then every side, in a process of its own, takes turns with
the others (see `turns.py`; two models in one process would share an allocator and hide each other's
peak memory). Both get the same fused AdamW over the same groups, the same threads, fp32 on the CPU
and bf16 autocast on CUDA. Neither side's trainer, loader or logging is part of the step; ours
includes turning uint8 pixels into normalised floats, which open_clip's loader has done before.

Rows: "padded" is equal work, captions padded to the whole context as open_clip's tokenizer does;
"trimmed" is what ours ships for CLIP, padded to the longest caption of the batch, the same loss and
gradients for less work (SigLIP reads its padding, so there it does not exist). `--compile` adds
torch.compile of both; `--chunk` a gradient-cache step on four batches against the plain step on
them.

"speed" is the median of (open_clip's seconds / ours) over rounds, above 1 where ours is faster,
with its interquartile range; "memory" what training adds to the loaded model's resident memory on
the CPU (gradients, AdamW's moments, activations), and the peak of allocated memory on CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parity
from rich.console import Console
from rich.table import Table
from step_sides import (
    Model,
    Setup,
    Side,
    TrainingStep,
    our_config,
    write_weights,
)
from turns import Step, Summary, print_json, remotes, take_turns

GIB = 2**30
MODELS: list[Model] = ["clip", "siglip"]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=10, help="quiet rounds, at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--gelu", action="store_true", help="GELU in both CLIPs, not QuickGELU")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides as well")
    parser.add_argument("--chunk", action="store_true", help="the gradient cache as well")
    parser.add_argument("--tiny", action="store_true", help="minute towers: a test of the script")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative, of gradients")
    parser.add_argument(
        "--others", type=float, default=0.05, help="share of the CPUs others may use in a round"
    )
    args = parser.parse_args()
    if args.pairs < 2 or args.batch < 2:
        parser.error("--pairs and --batch must be at least 2")
    return args


def comparisons(args: argparse.Namespace, trims: bool) -> list[list[Side]]:
    """Sides that run together; the first of each list is what the others are compared with."""
    found = [[Side(name="open_clip", library="open_clip", batch=args.batch)]]
    found[0].append(Side(name="ours, padded", library="ours", batch=args.batch))
    if trims:
        found[0].append(
            Side(name="ours, trimmed", library="ours", batch=args.batch, tokens="trimmed")
        )
    if args.compile:
        found.append([_compiled(side) for side in found[0]])
    if args.chunk:
        large = 4 * args.batch
        name = f"ours, {large} pairs"
        plain = Side(name=name, library="ours", batch=large)
        chunked = Side(name=f"{name}, chunked", library="ours", batch=large, chunk=args.batch)
        found.append([plain, chunked])
    return found


def _compiled(side: Side) -> Side:
    return Side(**{**vars(side), "name": f"{side.name}, compiled", "compile": True})


def compare(setup: Setup, sides: Sequence[Side], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Check that the sides agree, let them take turns, and sum up: one row per side."""
    folder = Path(setup.weights).parent
    with remotes([(TrainingStep, setup, side) for side in sides]) as workers:
        computed = [
            worker.call("parity", str(folder / f"{i}.safetensors"))
            for i, worker in enumerate(workers)
        ]
        errors = [parity.compare(result, computed[0]) for result in computed]
        for side, error in zip(sides, errors, strict=True):
            print(
                f"{side.name}: loss off by {error.loss:.1e}, gradients by {error.gradient:.1e}",
                flush=True,
            )
            parity.require(side.name, error, args.tolerance)
        for worker in workers:
            worker.call("begin")
        steps = take_turns(workers, args.pairs, args.others)
        memory = [worker.call("memory") for worker in workers]
    rows = []
    for i, side in enumerate(sides):
        speed = Summary.of(
            [_seconds(a) / _seconds(b) for a, b in zip(steps[0], steps[i], strict=True)]
        )
        phases = {phase: statistics.median(s[phase] for s in steps[i]) for phase in steps[i][0]}
        rows.append(
            {
                "side": side.name,
                "against": sides[0].name,
                "batch": side.batch,
                "seconds": statistics.median(map(_seconds, steps[i])),
                **phases,
                "speed": speed.median,
                "iqr": [speed.low, speed.high],
                "rounds": len(steps[i]),
                "memory": memory[i],
                "loss_error": errors[i].loss,
                "grad_error": errors[i].gradient,
            }
        )
    return rows


def _seconds(step: Step) -> float:
    return sum(step.values())


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """For people."""
    table = Table(title=title)
    for column in ("side", "ms/step", "forward", "backward", "optimiser", "speed", "IQR", "GiB"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        first = row["side"] == row["against"]
        last = following is not None and following["side"] == following["against"]
        phases = ("seconds", "forward", "backward", "optimiser")
        table.add_row(
            row["side"],
            *(f"{1000 * row[phase]:.1f}" for phase in phases),
            "1" if first else f"{row['speed']:.3f}",
            "" if first else "{:.3f} to {:.3f}".format(*row["iqr"]),
            "" if row["memory"] is None else f"{row['memory'] / GIB:.2f}",
            end_section=last,
        )
    Console(width=110).print(table)


def measure(model: Model, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All comparisons of one model."""
    setup = Setup(
        model=model,
        tiny=args.tiny,
        quick_gelu=not args.gelu,
        device=args.device,
        threads=args.threads,
        weights=str(folder / "weights.safetensors"),
    )
    write_weights(setup)
    trims = our_config(setup).tokenizer.trim
    rows = [row for sides in comparisons(args, trims) for row in compare(setup, sides, args)]
    return [{"model": model, **row} for row in rows]


def main() -> None:
    """Compares, prints tables and one line of JSON."""
    args = parse_args()
    precision = "bf16 autocast" if args.device == "cuda" else "fp32"
    results: list[dict[str, Any]] = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(model, args, Path(folder))
        print_table(rows, f"{model}, batch {args.batch}, {precision}, {args.threads} threads")
        results += rows
    options = {k: v for k, v in vars(args).items() if k != "device"}
    print_json("contrastive_step", args.device, precision=precision, **options, results=results)


if __name__ == "__main__":
    main()
