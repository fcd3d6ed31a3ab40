"""The board of a comparison, read back with TensorBoard's own readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from torch.utils.tensorboard import SummaryWriter

from fabricated_runs import BRIDGES, TOKENS, fabricate_ablation
from latentmodal.experiments.ablation.comparison import Comparison
from latentmodal.experiments.ablation.records import find_runs, read_run
from latentmodal.experiments.ablation.summary import summarize
from latentmodal.experiments.ablation.tensorboard import write_board
from latentmodal.experiments.errors import UserError

ROWS = len(BRIDGES) * len(TOKENS)
CELL, OTHER = "bridge=qformer,tokens=9", "bridge=resampler,tokens=9"


def compared(ablation: Path) -> Comparison:
    return summarize([read_run(run) for run in find_runs([ablation])])


def change(path: Path, **entries: Any) -> None:
    """Other values for some keys of a JSON file; "a.b" is a key inside of a."""
    content = json.loads(path.read_text())
    for key, value in entries.items():
        *parents, last = key.split(".")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compared(fabricate_ablation(tmp_path_factory.mktemp("ablation"), samples=True))


@pytest.fixture(scope="module")
def board(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "tensorboard"
    write_board(comparison, folder)
    return folder


def hparams(board: Path) -> tuple[Any, Any]:
    """The experiment, and the rows of the HPARAMS table: what the page asks the server for."""
    events = EventMultiplexer().AddRunsFromDirectory(str(board))
    events.Reload()
    provider = MultiplexerDataProvider(events, str(board))
    context = Context(TBContext(data_provider=provider))
    states = [api_pb2.STATUS_SUCCESS]
    request = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=states, slice_size=100, aggregation_type=api_pb2.AGGREGATION_AVG
    )
    asked = RequestContext()
    metadata = context.hparams_metadata(asked, "")
    experiment = context.experiment_from_metadata(
        asked, "", True, metadata, context.hparams_from_data_provider(asked, "", 100)
    )
    groups = Handler(asked, context, "", request).run().session_groups
    return experiment, groups


def test_a_row_of_hparams_is_a_cell_with_the_means_of_the_report(
    comparison: Comparison, board: Path
) -> None:
    _, groups = hparams(board)
    assert {group.name for group in groups} == {cell.label for cell in comparison.cells}
    for group in groups:
        cell = next(own for own in comparison.cells if own.label == group.name)
        assert len(group.sessions) == 3
        shown = {metric.name.tag: metric.value for metric in group.metric_values}
        for name, info in comparison.metrics.items():
            mean = cell.findings[name].mean
            assert mean is not None
            assert shown[name] == pytest.approx(mean * info.factor, rel=1e-6)
        assert shown["cost/trainable_parameters"] == cell.trainable_parameters
        assert shown["cost/tokens"] == cell.tokens
        assert shown["cost/step_ms"] == pytest.approx(1e3 * (cell.step_seconds or 0), rel=1e-6)
        assert shown["cost/peak_memory_MiB"] == 600


def rows(board: Path) -> dict[str, dict[str, float]]:
    _, groups = hparams(board)
    return {
        group.name: {own.name.tag: own.value for own in group.metric_values} for group in groups
    }


@pytest.mark.parametrize("spoilt", ["missing", "of one seed", "not the last", "without a step"])
def test_hparams_never_shows_another_value_than_the_report(spoilt: str, tmp_path: Path) -> None:
    ablation = fabricate_ablation(tmp_path / "ablation")
    for seed in range(3):
        run = ablation / "cells" / CELL / f"seed{seed}"
        if spoilt == "missing" or (spoilt == "of one seed" and seed):
            change(run / "eval.json", **{"sections.pairs.CHAIRi.value": None})
        elif spoilt == "not the last":
            evaluations = run / "evaluations"
            shutil.copy(evaluations / "step=00000100.json", evaluations / "step=00000400.json")
        elif spoilt == "without a step":
            change(run / "eval.json", context={})
    found = compared(ablation)
    write_board(found, tmp_path / "board")
    shown = rows(tmp_path / "board")[CELL]
    cell = next(own for own in found.cells if own.label == CELL)
    assert ("pairs/CHAIRi" in shown) == (spoilt != "missing")
    for name, info in found.metrics.items():
        if name in shown:
            mean = cell.findings[name].mean
            assert mean is not None
            assert shown[name] == pytest.approx(mean * info.factor, rel=1e-6)


def test_costs_are_reduced_as_in_the_report(tmp_path: Path) -> None:
    ablation = fabricate_ablation(tmp_path / "ablation")
    for seed, (seconds, mebibytes) in enumerate([(0.1, 600), (0.1, 600), (0.4, 900)]):
        cost = ablation / "cells" / CELL / f"seed{seed}" / "cost.json"
        change(cost, step_seconds=seconds, peak_memory_bytes=mebibytes * 2**20)
    write_board(compared(ablation), tmp_path / "board")
    shown = rows(tmp_path / "board")[CELL]
    assert shown["cost/step_ms"] == pytest.approx(100)  # the median; 200 were the mean
    assert shown["cost/peak_memory_MiB"] == 900  # the most


def test_no_two_cells_share_a_folder(tmp_path: Path) -> None:
    ablation = fabricate_ablation(tmp_path / "ablation", samples=True)
    labels = {CELL: "a/b", OTHER: "a|B", "bridge=average_pool,tokens=9": "long" * 100}
    for cell, label in labels.items():
        for seed in range(3):
            change(ablation / "cells" / cell / f"seed{seed}" / "cell.json", label=label)
    found = compared(ablation)
    write_board(found, tmp_path / "board")
    shown = rows(tmp_path / "board")
    for cell in found.cells:
        mean = cell.findings["pairs/CIDEr-D"].mean
        assert mean is not None
        assert shown[cell.label]["pairs/CIDEr-D"] == pytest.approx(100 * mean, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    head = events.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].splitlines()[0]
    assert rb" a\|B " in head  # else one column more than the rows have


def test_the_axes_alone_are_hyper_parameters(comparison: Comparison, board: Path) -> None:
    experiment, groups = hparams(board)
    columns = {info.name: info for info in experiment.hparam_infos}
    assert set(columns) == {"bridge", "tokens"}
    assert [v.number_value for v in columns["tokens"].domain_discrete.values] == [9, 36]
    assert {v.string_value for v in columns["bridge"].domain_discrete.values} == set(BRIDGES)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics[: len(comparison.metrics)] == list(comparison.metrics)
    assert [info.display_name for info in experiment.metric_infos] == [
        *("CIDEr-D x 100", "names_recall x 100", "CHAIRi x 100 \N{DOWNWARDS ARROW}"),
        *("trainable", "tokens read", "step, ms", "memory, MiB"),
    ]
    cells = {(g.hparams["bridge"].string_value, g.hparams["tokens"].number_value) for g in groups}
    assert len(cells) == ROWS


def test_charts_overlay_means_with_their_errors(comparison: Comparison, board: Path) -> None:
    whole = EventAccumulator(str(board)).Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(whole.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category  # these runs left no loss, so there is no chart of it
    charts = {chart.margin.series[0].value: chart.margin.series[0] for chart in category.chart}
    assert set(charts) == {f"mean/{name}" for name in comparison.metrics}
    for cell in comparison.cells:
        events = EventAccumulator(str(board / cell.label)).Reload()
        for name, info in comparison.metrics.items():
            finding, series = cell.findings[name], charts[f"mean/{name}"]
            mean, low, high = (
                [(event.step, event.value) for event in events.Scalars(tag)]
                for tag in (series.value, series.lower, series.upper)
            )
            assert [step for step, _ in mean] == [100, 200, 300]
            assert finding.mean is not None and finding.standard_error is not None
            assert mean[-1][1] == pytest.approx(finding.mean * info.factor, rel=1e-6)
            error = finding.standard_error * info.factor
            assert mean[-1][1] - low[-1][1] == pytest.approx(error, abs=1e-4)
            assert high[-1][1] - mean[-1][1] == pytest.approx(error, abs=1e-4)


def test_training_losses_are_overlaid(tmp_path: Path) -> None:
    ablation = fabricate_ablation(tmp_path / "ablation")
    for cell in (CELL, OTHER):
        for seed in range(3):
            with SummaryWriter(str(ablation / "cells" / cell / f"seed{seed}/tensorboard")) as log:
                for step in (10, 20):
                    log.add_scalar("train/loss", step + seed, step)
    write_board(compared(ablation), tmp_path / "board")
    whole = EventAccumulator(str(tmp_path / "board")).Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(whole.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (chart,) = next(own.chart for own in layout.category if own.title == "Training")
    assert list(chart.multiline.tag) == ["^mean/train/loss$"]
    for cell in (CELL, OTHER):
        events = EventAccumulator(str(tmp_path / "board" / cell)).Reload()
        points = [(event.step, event.value) for event in events.Scalars("mean/train/loss")]
        assert points == [(10, 11), (20, 21)]


def test_captions_stand_side_by_side(comparison: Comparison, board: Path) -> None:
    events = EventAccumulator(str(board)).Reload()
    table = events.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = table.splitlines()
    assert [line.count(" | ") for line in lines] == [ROWS + 1] * 5  # head, rule, three pictures
    head = lines[0].replace("\\", "")  # labels are escaped too
    assert all(cell.label in head for cell in comparison.cells)
    assert "a red &lt;apple&gt;; an apple" in lines[2]
    assert "what c\\_abstractor says of picture 2" in lines[4]
    assert [tag for tag in events.Tags()["images"] if tag.startswith("captions/")] == [
        f"captions/{row}" for row in range(3)
    ]
    text = events.Tensors("verdicts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "not distinguishable" in text and "bridge=c_abstractor,tokens=36" in text


def test_written_again_nothing_doubles(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    write_board(comparison, folder)
    before = {path.parent for path in folder.rglob("events*")}
    (tmp_path / ".tensorboard.new" / "half").mkdir(parents=True)  # of a call that was killed
    write_board(comparison, folder)
    files = list(folder.rglob("events*"))
    assert {path.parent for path in files} == before and len(files) == len(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert len(hparams(folder)[1]) == ROWS


@pytest.mark.parametrize("theirs", ["notes.txt", "mine/x", "../.board.old/x"])
def test_the_files_of_others_stay(comparison: Comparison, theirs: str, tmp_path: Path) -> None:
    folder = tmp_path / "board"
    write_board(comparison, folder)
    mine = (folder / theirs).resolve()
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{mine.name}: is not a comparison's"):
        write_board(comparison, folder)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_log_of_a_training_is_not_replaced(comparison: Comparison, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "logs")) as log:
        log.add_scalar("train/loss", 1.0, 1)
    (events,) = (tmp_path / "logs").iterdir()
    with pytest.raises(UserError, match="holds events that are not a comparison's"):
        write_board(comparison, tmp_path / "logs")
    assert events.is_file()


def test_a_board_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    ablation, folder = fabricate_ablation(tmp_path / "ablation", samples=True), tmp_path / "board"
    found = compared(ablation)
    write_board(found, folder)
    before = set(folder.rglob("*"))
    samples = ablation / "cells" / CELL / "seed0" / "samples.json"
    whole = samples.read_text()
    samples.write_text("{")
    with pytest.raises(UserError, match="is broken"):
        write_board(found, folder)
    assert set(folder.rglob("*")) == before
    samples.write_text(whole)
    write_board(found, folder)
    assert len(rows(folder)) == ROWS
    assert not (tmp_path / ".board.new").exists() and not (tmp_path / ".board.old").exists()
