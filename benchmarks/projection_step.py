"""One training step of MiniGPT-4's first stage: ours against the plainest use of transformers.

    python benchmarks/projection_step.py --batch 8 --pairs 10
    python benchmarks/projection_step.py --size 7b --device cuda --batch 64 --images features

The language model is a frozen Llama with random weights; one linear map from 32 Q-Former tokens
into it trains. The other side joins the embeddings of the first token, the soft tokens and a padded
caption, and calls transformers' model with an attention mask and labels: logits of all positions.
Ours pads to the longest of the batch, gives no mask, and makes the logits that have a label.

The loss and the projection's gradient are compared first, then the sides take turns (`turns.py`).
At `--size 7b` the language model is in bf16 from the start, and agreement can be no closer than
that; the same code agrees in fp32 at the small size.

Parts of the table, each compared with its first row: captions that the other side pads to 32; to
the longest of the batch; and pictures in place of random features, through a frozen tower and
Q-Former that are the same modules on both sides. There the last row reads cached features.

"speed", "memory" and "kept" say how many times less ours takes: seconds, the peak that training
adds to the loaded model (resident on the CPU, allocated on CUDA), and the bytes a forward keeps
for the backward. Tokens are those of prompts, padding aside. The share of the card's peak counts
2 FLOPs per weight and token forward, and 2 backward through the frozen weights, whose own gradients
nobody makes: the body's weights for all tokens, the head's for labelled ones. Attention's products
and the image side are left out, on all rows alike.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridge_inputs import PUBLISHED, REDUCED, TINY
from comparison import add_arguments, check_arguments, compare
from generation_step import language_model
from projection_sides import ProjectionStep, Setup, Side, draw_prompts
from rich.console import Console
from rich.table import Table
from turns import print_json

SHAPES = {"tiny": TINY, "reduced": REDUCED, "full": PUBLISHED}
TOWERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "vit_tiny_patch16_224",
        "image_size": 32,
        "model_kwargs": {"depth": 2, "embed_dim": 24},
    },
    "reduced": {"model": "vit_small_patch16_224"},
    "full": {"model": "eva_giant_patch14_clip_224", "features": "penultimate"},
}
BF16_TOLERANCE = 0.1  # of gradients that came through 32 layers in bf16


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, batch=8)
    parser.add_argument("--size", choices=["small", "7b"], default="small", help="7b: for a GPU")
    parser.add_argument(
        "--images", nargs="+", choices=["features", "pixels"], default=["features", "pixels"]
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989, help="the card's in bf16; an H100 SXM's is 989"
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.size == "7b" and args.device != "cuda":
        parser.error("--size 7b needs --device cuda")
    return args


def make_setup(args: argparse.Namespace, folder: Path) -> Setup:
    """Shapes, and where files go."""
    size = "tiny" if args.tiny else "full" if args.size == "7b" else "reduced"
    return Setup(
        shape=SHAPES[size],
        llm=language_model("llama", size, None),
        dtype="bfloat16" if size == "full" else "float32",
        tower=TOWERS[size],
        device=args.device,
        threads=args.threads,
        weights=str(folder / "weights.safetensors"),
    )


def comparisons(batch: int, images: Sequence[str]) -> list[list[Side]]:
    """Sides that run together; the first of each list is what the others are compared with."""
    ours = Side(name="ours", library="ours", batch=batch)
    found = []
    if "features" in images:
        plain = Side(name="transformers, to the longest", library="transformers", batch=batch)
        longer = replace(plain, name="transformers, padded to 32", tokens="padded")
        found += [[longer, ours], [plain, ours]]
    if "pixels" in images:
        plain = Side(
            name="transformers, pictures", library="transformers", batch=batch, images="pixels"
        )
        found.append(
            [
                plain,
                replace(plain, name="ours, pictures", library="ours"),
                replace(ours, name="ours, cached features", images="cached"),
            ]
        )
    return found


def useful_work(setup: Setup, batch: int) -> tuple[int, float]:
    """Tokens of a step without padding, and the FLOPs they ask of the language model."""
    prompts = draw_prompts(setup, batch)
    tokens, llm = int(prompts.mask_BT.sum()), setup.llm
    width, mlp_dim = llm["hidden_size"], llm["intermediate_size"]
    body = llm["num_hidden_layers"] * (4 * width**2 + 3 * width * mlp_dim)
    head = llm["vocab_size"] * width
    return tokens, 4.0 * (body * tokens + head * prompts.num_targets)


def with_ratios(
    rows: list[dict[str, Any]], setup: Setup, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of one comparison with what the first takes over what each takes, and throughput."""
    tokens, flops = useful_work(setup, args.batch)
    first = rows[0]
    found = []
    for row in rows:
        seconds, measured = row["seconds"], None not in (row["memory"], first["memory"])
        share = flops / seconds / (args.peak_tflops * 1e12) if args.device == "cuda" else None
        found.append(
            {
                **row,
                "memory_ratio": first["memory"] / row["memory"] if measured else None,
                "kept_ratio": first["kept"] / row["kept"],
                "tokens_per_second": tokens / seconds,
                "share_of_peak": share,
            }
        )
    return found


def print_ratios(rows: Sequence[dict[str, Any]], title: str) -> None:
    """For people."""
    table = Table(title=title)
    for column in ("side", "s/step", "speed", "IQR", "memory", "kept", "tokens/s", "of peak"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for row in rows:
        first = row["side"] == row["against"]
        if first:
            table.add_section()
        memory, share = row["memory_ratio"], row["share_of_peak"]
        table.add_row(
            row["side"],
            f"{row['seconds']:.3f}",
            "1" if first else f"{row['speed']:.2f}",
            "" if first else "{:.2f} to {:.2f}".format(*row["iqr"]),
            "" if memory is None else f"{memory:.2f}",
            f"{row['kept_ratio']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            "" if share is None else f"{share:.1%}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Compares, prints a table and one line of JSON."""
    args = parse_args()
    if args.size == "7b":
        args.tolerance = max(args.tolerance, BF16_TOLERANCE)
    precision = "bf16 autocast" if args.device == "cuda" else "fp32"
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(args, Path(folder))
        for sides in comparisons(args.batch, args.images):
            results += with_ratios(compare(ProjectionStep, setup, sides, args), setup, args)
    print_ratios(results, f"Llama, {args.size}, batch {args.batch}, {precision}")
    options = {k: v for k, v in vars(args).items() if k != "device"}
    print_json("projection_step", args.device, precision=precision, **options, results=results)


if __name__ == "__main__":
    main()
