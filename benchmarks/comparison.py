"""Sides of a training step against one another: agreement first, then turns, then a table."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import parity
from rich.console import Console
from rich.table import Table
from training_step import TrainingStep
from turns import Step, Summary, remotes, take_turns

GIB = 2**30


class Shared(Protocol):
    """What all sides of a comparison share."""

    @property
    def weights(self) -> str: ...


class Named(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str: ...

    @property
    def batch(self) -> int: ...


def add_arguments(parser: argparse.ArgumentParser, *, batch: int) -> None:
    """What every comparison of steps is told on the command line."""
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--pairs", type=int, default=10, help="quiet rounds, at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="minute models: a test of the script")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative, of gradients")
    parser.add_argument(
        "--others", type=float, default=0.05, help="share of the CPUs others may use in a round"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program unless there is something to compare."""
    if args.pairs < 2 or args.batch < 2:
        parser.error("--pairs and --batch must be at least 2")


def compare(
    step: type[TrainingStep], setup: Shared, sides: Sequence[Named], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Check that the sides agree, let them take turns, and sum up: one row per side.

    The first side is what the others are compared with.
    """
    folder = Path(setup.weights).parent
    with remotes([(step, setup, side) for side in sides]) as workers:
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
        kept = [worker.call("kept") for worker in workers]
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
                "kept": kept[i],
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
    for column in (
        *("side", "ms/step", "forward", "backward", "optimiser", "speed", "IQR"),
        *("peak GiB", "kept GiB"),
    ):
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
            f"{row['kept'] / GIB:.3f}",
            end_section=last,
        )
    Console(width=120).print(table)
