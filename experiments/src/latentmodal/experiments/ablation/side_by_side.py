"""What the cells of a comparison say of the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latentmodal.experiments.ablation.comparison import CellSummary
from latentmodal.experiments.ablation.records import RunRecord
from latentmodal.experiments.evaluation.samples import (
    SAMPLES_FILE,
    CaptionedSample,
    read_samples,
)


@dataclass(frozen=True)
class SharedSample:
    """A picture with what is true of it, and what each cell says of it."""

    sample: CaptionedSample
    captions: list[tuple[CellSummary, str]] = field(default_factory=list)


def shared_samples(cells: Sequence[CellSummary]) -> list[SharedSample]:
    """The pictures that most cells speak of; of each cell the run of the smallest seed that can.

    Raises:
        UserError: a run's samples are broken.
    """
    said: dict[str, SharedSample] = {}  # pictures are known by their data
    for cell in cells:
        for sample in _first_samples(cell.cell.usable):
            shared = said.setdefault(sample.picture, SharedSample(sample))
            shared.captions.append((cell, sample.caption))
    most = max((len(shared.captions) for shared in said.values()), default=0)
    return [shared for shared in said.values() if len(shared.captions) == most]


def _first_samples(runs: Sequence[RunRecord]) -> list[CaptionedSample]:
    for run in runs:
        if found := read_samples(run.path / SAMPLES_FILE):
            return found
    return []
