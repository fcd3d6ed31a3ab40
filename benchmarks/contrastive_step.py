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
with its interquartile range; "peak" what training adds to the loaded model's resident memory on
the CPU (gradients, AdamW's moments, activations), and the peak of allocated memory on CUDA; "kept"
what a forward keeps for the backward.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from comparison import add_arguments, check_arguments, compare, print_table
from step_sides import ContrastiveStep, Model, Setup, Side, our_config, write_weights
from turns import print_json

MODELS: list[Model] = ["clip", "siglip"]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    add_arguments(parser, batch=8)
    parser.add_argument("--gelu", action="store_true", help="GELU in both CLIPs, not QuickGELU")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides as well")
    parser.add_argument("--chunk", action="store_true", help="the gradient cache as well")
    args = parser.parse_args()
    check_arguments(parser, args)
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
    rows = [
        row
        for sides in comparisons(args, trims)
        for row in compare(ContrastiveStep, setup, sides, args)
    ]
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
