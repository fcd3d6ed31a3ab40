"""One training step of BLIP-2's second stage: ours against transformers' class with labels.

    python benchmarks/generation_step.py --llm opt llama --batch 8 --pairs 10
    python benchmarks/generation_step.py --llm opt --full --device cuda --batch 32

The other side is `Blip2ForConditionalGeneration` as it comes: Q-Former, projection, a frozen causal
language model, `labels=`, whatever attention it takes by itself. It makes logits of all positions.
Ours makes those that have a label, and gives the language model no mask to look at.

Features of the frozen encoder are given: it costs both sides the same, and a whole step gains less
than what is shown here. Same weights, no dropout. The loss and all gradients of the bridge are
compared first, in fp32, then the sides take turns (`turns.py`): fp32 on the CPU; bf16 autocast with
the language model in bf16 on CUDA.

Rows: "padded" texts have 32 tokens, LAVIS' limit; "trimmed" ones the length of the batch's longest,
which is how LAVIS pads in this stage. The second part of the table has both sides trimmed, and is
the one to judge the code by.

"speed" is the median of (their seconds / ours) over rounds, with its interquartile range; "peak"
what training adds to the loaded model's resident memory on the CPU, and the peak of allocated
memory, weights included, on CUDA; "kept" what a forward keeps for the backward, features and
weights aside.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bridge_inputs import PUBLISHED, REDUCED, TINY
from comparison import add_arguments, check_arguments, compare, print_table
from generation_sides import (
    END_ID,
    PAD_ID,
    START_ID,
    GenerationStep,
    Setup,
    Side,
    write_weights,
)
from turns import print_json

VOCABULARY = {"opt": 50272, "llama": 32000}
# Width, layers, heads, width of the feed-forward.
SIZES = {
    "tiny": {"opt": (32, 2, 2, 64), "llama": (32, 2, 2, 64)},
    "reduced": {"opt": (512, 8, 8, 2048), "llama": (512, 8, 8, 1376)},
    "full": {"opt": (2560, 32, 32, 10240), "llama": (4096, 32, 32, 11008)},  # OPT-2.7B, Llama-7B
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, batch=8)
    parser.add_argument("--llm", nargs="+", choices=sorted(VOCABULARY), default=["opt", "llama"])
    parser.add_argument("--vocab", type=int, help="another vocabulary than the model's own")
    parser.add_argument("--full", action="store_true", help="published sizes, for a GPU")
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def language_model(llm: str, size: str, vocab_size: int | None) -> dict[str, Any]:
    """transformers' configuration, without dropout."""
    width, layers, heads, mlp_dim = SIZES[size][llm]
    common = {
        "model_type": llm,
        "vocab_size": vocab_size or (80 if size == "tiny" else VOCABULARY[llm]),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD_ID,
        "bos_token_id": START_ID,
        "eos_token_id": END_ID,
        "attention_dropout": 0.0,
    }
    if llm == "llama":
        return {**common, "intermediate_size": mlp_dim}
    return {**common, "ffn_dim": mlp_dim, "word_embed_proj_dim": width, "dropout": 0.0}


def comparisons(batch: int) -> list[list[Side]]:
    """Sides that run together; the first of each list is what the others are compared with."""
    return [
        [
            Side(name="transformers, padded", library="transformers", batch=batch),
            Side(name="ours, padded", library="ours", batch=batch),
            Side(name="ours, trimmed", library="ours", batch=batch, tokens="trimmed"),
        ],
        [
            Side(
                name="transformers, trimmed",
                library="transformers",
                batch=batch,
                tokens="trimmed",
            ),
            Side(name="ours, trimmed", library="ours", batch=batch, tokens="trimmed"),
        ],
    ]


def measure(llm: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All comparisons with one language model."""
    size = "tiny" if args.tiny else "full" if args.full else "reduced"
    setup = Setup(
        shape={"tiny": TINY, "reduced": REDUCED, "full": PUBLISHED}[size],
        llm=language_model(llm, size, args.vocab),
        device=args.device,
        threads=args.threads,
        weights=str(folder / "weights.safetensors"),
    )
    write_weights(setup)
    found = [
        row
        for sides in comparisons(args.batch)
        for row in compare(GenerationStep, setup, sides, args)
    ]
    return [{"llm": llm, **row} for row in found]


def main() -> None:
    """Compares, prints tables and one line of JSON."""
    args = parse_args()
    precision = "bf16 autocast" if args.device == "cuda" else "fp32"
    results: list[dict[str, Any]] = []
    for llm in args.llm:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(llm, args, Path(folder))
        print_table(rows, f"{llm}, batch {args.batch}, {precision}, {args.threads} threads")
        results += rows
    options = {k: v for k, v in vars(args).items() if k != "device"}
    print_json("generation_step", args.device, precision=precision, **options, results=results)


if __name__ == "__main__":
    main()
