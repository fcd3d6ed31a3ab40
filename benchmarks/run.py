"""Run the benchmarks one after another, each in a process of its own.

    python benchmarks/run.py                       # all, as `make bench` does
    python benchmarks/run.py contrastive_step --quick
    python benchmarks/run.py --device cuda --save h100

With `--save` the JSON lines they end with are kept in `benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

# Arguments of a full run, and what `--quick` changes.
FULL: dict[str, list[str]] = {
    "contrastive_step": ["--chunk"],
    "sigmoid_memory": [],
    "loader": [],
    "qformer_step": [],
    "generation_step": [],
    "projection_step": [],
    "itm_traffic": [],
}
QUICK: dict[str, list[str]] = {
    "contrastive_step": ["--pairs", "3"],
    "sigmoid_memory": ["--pairs", "9"],
    "loader": ["--images", "256", "--repeats", "3"],
    "qformer_step": ["--pairs", "3"],
    "generation_step": ["--pairs", "3", "--llm", "opt"],
    "projection_step": ["--pairs", "3", "--images", "features"],
    "itm_traffic": ["--batch", "8"],
}
# A GPU is busy only with a batch of some size. The loader runs on the CPU wherever it feeds, and
# the traffic is counted where there may be no second GPU.
ON_CUDA: dict[str, list[str]] = {
    "contrastive_step": ["--device", "cuda", "--batch", "256", "--compile"],
    "sigmoid_memory": ["--device", "cuda", "--batch", "8192"],
    "loader": [],
    "qformer_step": ["--device", "cuda", "--full", "--batch", "64"],
    "generation_step": ["--device", "cuda", "--full", "--batch", "32", "--llm", "opt"],
    "projection_step": ["--device", "cuda", "--size", "7b", "--batch", "32"],
    "itm_traffic": [],
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FULL)}; all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a few minutes, wider error bars")
    parser.add_argument("--save", metavar="NAME", help="keep results/NAME.json")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FULL]:
        parser.error(f"no benchmark {unknown[0]!r}; choose from {', '.join(FULL)}")
    if args.save is not None and not re.fullmatch(r"[\w-]+", args.save):
        parser.error(f"--save {args.save!r} is not a name; use letters, digits, - and _")
    return args


def run(name: str, arguments: list[str]) -> dict[str, Any] | None:
    """Run one benchmark, show its output, and return its JSON line; None if it failed."""
    print(f"\n== {name} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line
    if process.returncode != 0:
        return None
    result: dict[str, Any] = json.loads(last)
    return result


def main() -> None:
    """Runs what was asked for; exits with 1 if any of it failed."""
    args = parse_args()
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in args.names or FULL:
        arguments = [*(QUICK if args.quick else FULL)[name]]
        if args.device == "cuda":
            arguments += ON_CUDA[name]
        result = run(name, arguments)
        if result is None:
            failed.append(name)
        else:
            results.append(result)
    if args.save is not None:
        path = HERE / "results" / f"{args.save}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
