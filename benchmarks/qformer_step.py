"""One training step of BLIP-2's first stage: ours against the same objectives out of transformers.

    python benchmarks/qformer_step.py --batch 8 --pairs 10
    python benchmarks/qformer_step.py --full --device cuda --batch 64

The other side is assembled from transformers' Q-Former, text embeddings and heads in the plainest
way (`qformer_sides.py`): a pass over queries and one over texts for the contrastive objective, one
over three times the batch for matching, one over queries and texts under a prefix mask for
captioning, whose head sees every position. Ours makes keys and values of the image once for all
passes, lets captioning read the queries from the first pass, and applies the head where words are.

Features of the frozen encoder are given: it costs both sides the same, and a whole step gains less
than what is shown here. Same weights, no dropout, the same negatives (drawn by one function from
each side's similarities). Losses and all gradients are compared first, in fp32, then the sides take
turns (`turns.py`): fp32 on the CPU, bf16 autocast on CUDA.

Rows: "padded" is equal work, captions padded to 32 tokens as in LAVIS; "trimmed" is what our
tokenizer ships, padded to the longest of the batch (rounded up to a multiple of 8).

"speed" is the median of (their seconds / ours) over rounds, with its interquartile range; "peak"
what training adds to the loaded model's resident memory on the CPU, and the peak of allocated
memory on CUDA; "kept" what a forward keeps for the backward, features and weights aside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bridge_inputs import PUBLISHED, REDUCED, TINY
from comparison import add_arguments, check_arguments, compare, print_table
from qformer_sides import AlignmentStep, Setup, Side, write_weights
from turns import print_json


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, batch=8)
    parser.add_argument("--full", action="store_true", help="the published size, for a GPU")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def main() -> None:
    """Compares, prints a table and one line of JSON."""
    args = parse_args()
    precision = "bf16 autocast" if args.device == "cuda" else "fp32"
    shape = TINY if args.tiny else PUBLISHED if args.full else REDUCED
    sides = [
        Side(name="transformers, padded", library="transformers", batch=args.batch),
        Side(name="ours, padded", library="ours", batch=args.batch),
        Side(name="ours, trimmed", library="ours", batch=args.batch, tokens="trimmed"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            shape=shape,
            device=args.device,
            threads=args.threads,
            weights=str(Path(folder) / "weights.safetensors"),
        )
        write_weights(setup)
        rows = compare(AlignmentStep, setup, sides, args)
    size = f"{shape.layers} layers of {shape.width}"
    print_table(rows, f"{size}, batch {args.batch}, {precision}, {args.threads} threads")
    options = {k: v for k, v in vars(args).items() if k != "device"}
    print_json("qformer_step", args.device, precision=precision, **options, results=rows)


if __name__ == "__main__":
    main()
