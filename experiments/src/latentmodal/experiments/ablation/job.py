"""A worker's process: `python -m latentmodal.experiments.ablation.job fit|prepare FOLDER THREADS`.

`fit` trains and evaluates the run whose recipe lies in FOLDER, or goes on with it. `prepare` does
what FOLDER/prepare.json lists: fills the feature caches that cells share, and measures their costs.
What goes wrong is left in FOLDER/failed.json. The process ends with the one that started it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentmodal.experiments.orphans import adopted, end_with_parent

# Nothing slow is imported here: the process first sees to it that it cannot be left behind.
log = logging.getLogger(__name__)

PARENT = "LATENTMODAL_PARENT"
"""Variable of the environment: the process to end with."""
PREPARE_FILE = "prepare.json"


def main() -> None:
    """Do one job; exit code 1 where it failed."""
    _end_with_ablation()
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    import torch

    torch.set_num_threads(threads)
    try:
        fit(folder) if kind == "fit" else prepare(folder)
    except Exception as error:
        log.exception("failed")
        write_failure(folder, one_line(error))
        sys.stdout.flush()
        sys.exit(1)


def fit(folder: Path) -> None:
    """Train the run in `folder` to its end, from its newest checkpoint where it has one."""
    from rich.console import Console

    from latentmodal.experiments.ablation.records import FAILED_FILE
    from latentmodal.experiments.recipe import load_recipe
    from latentmodal.experiments.training.fit import fit as run_fit
    from latentmodal.experiments.training.fit import process_rank

    recipe = load_recipe(str(folder / "recipe.yaml"))
    console = Console(file=sys.stdout, width=100, force_terminal=False)
    if process_rank(recipe.trainer.devices) > 0:  # its first rank sees to the rest
        run_fit(recipe, resume=True, console=console)
        return
    with _only_writer(folder):
        run_fit(recipe, resume=True, console=console)
        (folder / FAILED_FILE).unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    """Fill caches and measure costs; a cell that cannot be measured is noted, the others go on.

    So do those whose cache can be filled; whoever finds none says so by itself.
    """
    from rich.console import Console

    from latentmodal.experiments.ablation.costs import CostFile, measure
    from latentmodal.experiments.feature_cache.filling import cache_features
    from latentmodal.experiments.recipe import build_config
    from latentmodal.experiments.schema import Recipe

    todo = json.loads((folder / PREPARE_FILE).read_text(encoding="utf-8"))
    costs = CostFile(folder / "costs.json")
    for label, item in todo["measure"].items():
        log.info("measuring %s", label)
        try:
            costs.put(label, item["digest"], measure(build_config(Recipe, item["recipe"])))
        except Exception as error:
            log.exception("%s cannot be measured", label)
            costs.put(label, item["digest"], one_line(error))
    failures = []
    for raw in todo["cache"]:
        recipe = build_config(Recipe, raw)
        try:
            # What lies before the bridge is common to cells of different bridges.
            cache_features(recipe, upto="encoder", console=Console(file=sys.stdout))
        except Exception as error:
            log.exception("the cache of %s cannot be filled", recipe.name)
            failures.append(error)
    if failures and len(failures) == len(todo["cache"]):
        raise failures[0]


def write_failure(folder: Path, reason: str) -> None:
    """Say in `folder` why its run failed."""
    from latentmodal.experiments.ablation.records import FAILED_FILE
    from latentmodal.experiments.files import write_text_atomically

    write_text_atomically(folder / FAILED_FILE, json.dumps({"reason": reason}) + "\n")


def one_line(error: BaseException) -> str:
    """An exception's first line, with its type where it is no message for users."""
    from latentmodal.experiments.errors import UserError

    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait for a job that still writes here, such as one submitted before its ablation was killed.

    The system lets go of the lock when that process ends, however it does; and it is not
    inherited, so a data loader's worker that is left over does not hold it.
    """
    with (folder / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def _end_with_ablation() -> None:
    end_with_parent()
    parent = os.environ.pop(PARENT, None)
    if parent is not None and adopted(int(parent)):
        sys.exit(1)


if __name__ == "__main__":
    main()
