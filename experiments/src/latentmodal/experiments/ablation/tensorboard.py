"""A comparison in TensorBoard: HPARAMS, overlaid curves, and what the cells say side by side.

Of each cell there is a run of its means, and below it one of each seed. HPARAMS groups the seeds of
a cell into one row, whose metrics are their means: the same numbers as in the report. What it reads
of a run is the last point of each curve, so the curves of seeds end with the values compared.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from tensorboard.plugins.hparams import summary_v2  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as session_summaries

from latentmodal.experiments.ablation.comparison import CellSummary, Comparison, MetricInfo
from latentmodal.experiments.ablation.curve_data import Points, loss_points, metric_points
from latentmodal.experiments.ablation.expand import folder_name
from latentmodal.experiments.ablation.records import RunRecord
from latentmodal.experiments.ablation.side_by_side import SharedSample, shared_samples
from latentmodal.experiments.ablation.tables import markdown, ordered
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.sheets import side_by_side_picture
from latentmodal.experiments.evaluation.tensorboard import as_tensor

MARK: Final = ".latentmodal-board"
"""A file in folders that may be replaced, because a board was written there."""
_EVENTS: Final = "events.out.tfevents."
"""How the name of every other file of a board begins."""
_MAX_NAME: Final = 200
"""Bytes of a folder's name; file systems allow 255."""

LOSS: Final = "train/loss"
_COSTS: Final = {
    "trainable_parameters": ("cost/trainable_parameters", "trainable", 1.0),
    "tokens": ("cost/tokens", "tokens read", 1.0),
    "step_seconds": ("cost/step_ms", "step, ms", 1e3),
    "peak_memory_bytes": ("cost/peak_memory_MiB", "memory, MiB", 2.0**-20),
}
"""Attribute of a cell -> its tag, its column in HPARAMS, and what it is multiplied with."""


def write_board(comparison: Comparison, folder: Path) -> None:
    """Write the board, in place of the one that was in `folder` before.

    Raises:
        UserError: `folder` holds something else, a run's curves or samples are broken, or the disk
            refuses.
    """
    try:
        with _replacing(folder) as fresh:
            tags = set[str]()
            for cell, name in zip(comparison.cells, _folder_names(comparison), strict=True):
                tags |= _write_cell(comparison, cell, fresh / name)
            _write_whole(comparison, tags, fresh)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the board ({error}); free space") from error


def _folder_names(comparison: Comparison) -> list[str]:
    """The cells' labels as names of folders, short enough and no two alike."""
    names: dict[str, str] = {}  # some file systems do not tell a from A
    for cell in comparison.cells:
        name = short = folder_name(cell.label).encode()[:_MAX_NAME].decode(errors="ignore")
        number = 1
        while name.casefold() in names:
            number += 1
            name = f"{short}+{number}"
        names[name.casefold()] = name
    return list(names.values())


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of the old one at the end; one cut short is thrown away."""
    folder = folder.resolve()
    fresh, old = (folder.with_name(f".{folder.name}.{part}") for part in ("new", "old"))
    for place in (folder, fresh, old):
        _refuse_foreign(place)
    if any(path.is_file() for path in folder.rglob("*")) and not (folder / MARK).is_file():
        raise UserError(
            f"{folder}: holds events that are not a comparison's; choose another folder"
        )
    for left in (fresh, old):
        _remove(left)
    fresh.mkdir(parents=True)
    (fresh / MARK).touch()
    yield fresh
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    _remove(old)


def _refuse_foreign(folder: Path) -> None:
    """What anyone else left in a board's folder must not go with the board."""
    for path in (folder, *sorted(folder.rglob("*"))):
        ours = path.is_dir() or path.name == MARK or path.name.startswith(_EVENTS)
        if path.is_symlink() or (path.exists() and not ours):
            raise UserError(
                f"{path}: is not a comparison's; move it away, or choose another folder"
            )


def _remove(folder: Path) -> None:
    """Remove a folder in which nothing is foreign."""
    if folder.exists():
        shutil.rmtree(folder)


def _write_whole(comparison: Comparison, tags: set[str], folder: Path) -> None:
    """What is of all cells together; `tags` are their curves."""
    with _writer(folder) as writer:
        _add_summary(writer, _columns(comparison))
        writer.add_custom_scalars(_charts(comparison, tags))
        writer.add_text("verdicts", markdown(comparison))
        cells = ordered(comparison)
        if samples := shared_samples(cells):
            writer.add_text("captions", _captions_table(samples))
        for number, shared in enumerate(samples):
            said = [(cell.label, caption) for cell, caption in shared.captions]
            picture = side_by_side_picture(shared.sample.image(), shared.sample.references, said)
            writer.add_image(f"captions/{number}", as_tensor(picture))


def _write_cell(comparison: Comparison, cell: CellSummary, folder: Path) -> set[str]:
    """A run for each seed with a value, and one of their means; returns their tags."""
    curves: dict[str, list[Points]] = {}
    for run in cell.cell.usable:
        own = _curves(comparison, run)
        for tag, points in own.items():
            curves.setdefault(tag, []).append(points)
        # A curve that did not reach the end would stand in HPARAMS as the value it lacks.
        lacking = {tag for tag in comparison.metrics if run.seed not in cell.findings[tag].values}
        with _writer(folder / f"seed{run.seed}") as writer:
            hparams = {axis: _typed(comparison, axis, value) for axis, value in cell.axes.items()}
            _add_summary(writer, summary_v2.hparams_pb(hparams, trial_id=cell.label))
            for tag, points in own.items():
                for step, value in points if tag not in lacking else ():
                    writer.add_scalar(tag, value, int(step))
            _add_costs(writer, cell, run.step or 0)
            *_, ended = session_summaries({}, {})  # tensorboard's own maker needs tensorflow
            _add_summary(writer, ended)
    if curves:
        with _writer(folder) as writer:
            for tag, lines in curves.items():
                _add_mean(writer, tag, lines)
    return set(curves)


def _curves(comparison: Comparison, run: RunRecord) -> dict[str, Points]:
    """By tag: the metrics as they are shown, and the loss of training."""
    curves = {}
    for name, points in metric_points(run, list(comparison.metrics)).items():
        if ended := _ended(run, name, points):
            factor = comparison.metrics[name].factor
            curves[name] = [(step, value * factor) for step, value in ended]
    loss = loss_points(run)
    return {**curves, LOSS: loss} if loss else curves


def _ended(run: RunRecord, metric: str, points: Points) -> Points:
    """The points up to the value that is compared, which is the last one whatever came after it."""
    own = run.metrics.get(metric)
    if own is None or own.value is None:
        return points
    end = max((step for step, _ in points), default=0) if run.step is None else run.step
    return [*((step, value) for step, value in points if step < end), (end, own.value)]


def _add_mean(writer: SummaryWriter, tag: str, lines: Sequence[Points]) -> None:
    """The mean over seeds, and a standard error to both sides, at the steps they all have."""
    values = [dict(points) for points in lines]
    for step in sorted(set.intersection(*(set(own) for own in values))):
        here = [own[step] for own in values]
        mean = fmean(here)
        error = stdev(here) / len(here) ** 0.5 if len(here) > 1 else 0.0
        for kind, value in (("mean", mean), ("low", mean - error), ("high", mean + error)):
            writer.add_scalar(f"{kind}/{tag}", value, int(step))


def _add_costs(writer: SummaryWriter, cell: CellSummary, step: int) -> None:
    """What the cell took: a median and a maximum are not what HPARAMS makes of the runs' own."""
    for name, (tag, _, factor) in _COSTS.items():
        amount = getattr(cell, name)
        if amount is not None:
            writer.add_scalar(tag, amount * factor, step)


def _columns(comparison: Comparison) -> Any:
    """The columns of HPARAMS: the axes alone are hyper-parameters."""
    axes: dict[str, list[str | float]] = {}
    for cell in comparison.cells:
        for axis, value in cell.axes.items():
            found = axes.setdefault(axis, [])
            if (typed := _typed(comparison, axis, value)) not in found:
                found.append(typed)
    metrics = [
        summary_v2.Metric(name, display_name=_column(comparison, info), description=info.protocol)
        for name, info in comparison.metrics.items()
    ]
    metrics += [summary_v2.Metric(tag, display_name=own) for tag, own, _ in _COSTS.values()]
    domains = {axis: summary_v2.Discrete(sorted(values)) for axis, values in axes.items()}
    hparams = [summary_v2.HParam(axis, domain) for axis, domain in domains.items()]
    return summary_v2.hparams_config_pb(hparams=hparams, metrics=metrics)


def _column(comparison: Comparison, info: MetricInfo) -> str:
    """Short, as titles of parallel coordinates stand close: no section where none is needed."""
    names = [name.partition("/")[2] for name in comparison.metrics]
    short = info.name.partition("/")[2]
    scale = " x 100" if info.factor > 1 else ""
    lower = " \N{DOWNWARDS ARROW}" if info.better == "lower" else ""
    return f"{short if names.count(short) == 1 else info.name}{scale}{lower}"


def _title(info: MetricInfo) -> str:
    lower = ", lower is better" if info.better == "lower" else ""
    scale = " x 100" if info.factor > 1 else ""
    return f"{info.name}{scale}{lower}"


def _typed(comparison: Comparison, axis: str, value: str) -> str | float:
    """A number where the axis has nothing but numbers."""
    every = [cell.axes[axis] for cell in comparison.cells if axis in cell.axes]
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    return float(value) if all(re.fullmatch(number, own) for own in every) else value


def _charts(comparison: Comparison, tags: set[str]) -> dict[str, dict[str, list[Any]]]:
    """Custom scalars: the means of all cells in one chart for each metric, and their losses."""
    metrics = {
        _title(info): ["Margin", [f"{kind}/{name}" for kind in ("mean", "low", "high")]]
        for name, info in reversed(comparison.metrics.items())  # TensorBoard shows the last first
        if name in tags
    }
    training = {"training loss": ["Multiline", [f"^mean/{re.escape(LOSS)}$"]]}
    charts = {"Metrics, mean ± standard error over seeds": metrics}
    return {**charts, "Training": training} if LOSS in tags else charts


def _captions_table(samples: Sequence[SharedSample]) -> str:
    """Pictures in rows, cells in columns; the pictures themselves are among the images."""
    labels = [cell.label for cell, _ in samples[0].captions]
    rows = [["", "true of it", *map(_plain, labels)], ["---"] * (len(labels) + 2)]
    for number, shared in enumerate(samples):
        said = {cell.label: caption or "(nothing)" for cell, caption in shared.captions}
        true = "; ".join(shared.sample.references)
        rows.append([str(number), *map(_plain, (true, *(said.get(own, "") for own in labels)))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    """Markdown that shows as this text."""
    return re.sub(r"([\\`*_{}\[\]()#+!|-])", r"\\\1", escape(" ".join(text.split()), quote=False))


@contextmanager
def _writer(folder: Path) -> Iterator[SummaryWriter]:
    # Its files have a new name each time: by that TensorBoard, while it runs, sees a new board.
    writer = SummaryWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def _add_summary(writer: SummaryWriter, summary: Any) -> None:
    writer._get_file_writer().add_summary(summary)
