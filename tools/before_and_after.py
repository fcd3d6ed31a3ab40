"""A run's evaluation before its first step beside that after its last, as a markdown table.

    python tools/before_and_after.py RUN...

Several runs (seeds of one recipe) give the mean of each figure, and each run's own behind it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FIRST = "evaluations/step=00000000.json"


def figures(file: Path) -> dict[str, dict[str, Any]]:
    """Metrics of an evaluation by `task: name`."""
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    return {
        f"{task}: {name}": metric
        for task, metrics in sections.items()
        for name, metric in metrics.items()
    }


def shown(metrics: list[dict[str, Any]]) -> str:
    """The mean, and where there are several runs, each."""
    values = [metric["value"] for metric in metrics]
    if any(value is None for value in values):
        return "-"
    percent = metrics[0].get("unit") == "share"
    texts = [f"{100 * value:.1f} %" if percent else f"{value:.2f}" for value in values]
    if len(texts) == 1:
        return texts[0]
    mean = sum(values) / len(values)
    first = f"{100 * mean:.1f} %" if percent else f"{mean:.2f}"
    return f"{first} ({', '.join(texts)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path)
    runs: list[Path] = parser.parse_args().runs
    for run in runs:
        for file in (run / FIRST, run / "eval.json"):
            if not file.is_file():
                sys.exit(f"error: {file} is missing; fit the recipe with evaluation.at_start=true")
    before = [figures(run / FIRST) for run in runs]
    after = [figures(run / "eval.json") for run in runs]
    lines = ["| | before | after |", "|---|---|---|"]
    for name in after[0]:
        if all(name in found for found in (*before, *after)):
            first, last = ([found[name] for found in side] for side in (before, after))
            lines.append(f"| {name} | {shown(first)} | {shown(last)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
