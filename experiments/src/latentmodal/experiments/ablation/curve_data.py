"""What runs left on their way: evaluations by step, and the training loss of TensorBoard."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Final

from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from latentmodal.experiments.ablation.records import RunRecord, read_report
from latentmodal.experiments.training.run_folder import RunFolder

Points = list[tuple[float, float]]

MAX_POINTS: Final = 120
_SIZES: Final = {"images": 1, "audio": 1, "histograms": 1, "tensors": 1, "scalars": 4000}
"""What is read into memory; but for scalars nothing is needed."""


def metric_points(run: RunRecord, metrics: Sequence[str]) -> dict[str, Points]:
    """By metric, the values of the run's evaluations by step, the last one included.

    Raises:
        UserError: an evaluation is broken.
    """
    found: dict[str, dict[int, float]] = {metric: {} for metric in metrics}
    folder = RunFolder(run.path).evaluation_file(0).parent
    files = {
        int(match[1]): path
        for path in folder.glob("step=*.json")
        if (match := re.fullmatch(r"step=(\d+)\.json", path.name))
    }
    for step, path in files.items():
        report = read_report(path)
        sections = {} if report is None else report.sections
        for metric in metrics:
            section, _, name = metric.partition("/")
            own = sections.get(section, {}).get(name)
            if own is not None and own.value is not None:
                found[metric][step] = own.value
    for metric in metrics:
        last = run.metrics.get(metric)
        if last is not None and last.value is not None and run.step is not None:
            found[metric][run.step] = last.value
    return {metric: [*sorted(points.items())] for metric, points in found.items()}


def loss_points(run: RunRecord) -> Points:
    """The training loss by step, thinned to means of at most `MAX_POINTS` equal spans."""
    logs = RunFolder(run.path).logs
    if not logs.is_dir():
        return []
    newest = max((path.stat().st_mtime for path in logs.iterdir()), default=0.0)
    return [*_loss_points(logs.resolve(), newest)]


@cache  # a report and a board both want them, and checking an event file takes its time
def _loss_points(logs: Path, newest: float) -> tuple[tuple[float, float], ...]:
    del newest  # files that grew are read again
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells of each file it opens
    events = EventAccumulator(str(logs), size_guidance=_SIZES).Reload()
    tag = next((tag for tag in ("train/loss", "loss") if tag in events.Tags()["scalars"]), None)
    if tag is None:
        return ()
    # A resumed run logged the steps past its checkpoint twice; the later ones count.
    points = sorted({event.step: event.value for event in events.Scalars(tag)}.items())
    span = -(-len(points) // MAX_POINTS)
    spans = [points[start : start + span] for start in range(0, len(points), span)]
    return tuple((own[len(own) // 2][0], fmean(value for _, value in own)) for own in spans)
