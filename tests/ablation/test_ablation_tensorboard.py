"""The board of a comparison, read back with TensorBoard's own readers."""

from __future__ import annotations

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

from fabricated_runs import BRIDGES, TOKENS, fabricate_ablation
from latentmodal.experiments.ablation.comparison import Comparison
from latentmodal.experiments.ablation.records import find_runs, read_run
from latentmodal.experiments.ablation.summary import summarize
from latentmodal.experiments.ablation.tensorboard import write_board
from latentmodal.experiments.errors import UserError

ROWS = len(BRIDGES) * len(TOKENS)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = fabricate_ablation(tmp_path_factory.mktemp("ablation"), samples=True)
    return summarize([read_run(run) for run in find_runs([folder])])


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


def test_the_axes_alone_are_hyper_parameters(comparison: Comparison, board: Path) -> None:
    experiment, groups = hparams(board)
    columns = {info.name: info for info in experiment.hparam_infos}
    assert set(columns) == {"bridge", "tokens"}
    assert [v.number_value for v in columns["tokens"].domain_discrete.values] == [9, 36]
    assert {v.string_value for v in columns["bridge"].domain_discrete.values} == set(BRIDGES)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics[: len(comparison.metrics)] == list(comparison.metrics)
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


def test_captions_stand_side_by_side(comparison: Comparison, board: Path) -> None:
    events = EventAccumulator(str(board)).Reload()
    table = events.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = table.splitlines()
    assert [line.count(" | ") for line in lines] == [ROWS + 1] * 5  # head, rule, three pictures
    assert all(cell.label in lines[0] for cell in comparison.cells)
    assert "a red &lt;apple&gt;; an apple" in lines[2]
    assert "what c\\_abstractor says of picture 2" in lines[4]
    assert [tag for tag in events.Tags()["images"] if tag.startswith("captions/")] == [
        f"captions/{row}" for row in range(3)
    ]
    text = events.Tensors("comparison/text_summary")[0].tensor_proto.string_val[0].decode()
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


def test_the_files_of_others_stay(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a comparison's"):
        write_board(comparison, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
