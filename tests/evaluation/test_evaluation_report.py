"""The report on disk, as a table, and in TensorBoard."""

import io
import json
import os

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.writer import SummaryWriter

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.evaluation.choices import ChoiceResult
from latentmodal.experiments.evaluation.report import (
    EvalReport,
    choices_section,
    retrieval_section,
    zero_shot_section,
)
from latentmodal.experiments.evaluation.retrieval import retrieval_metrics
from latentmodal.experiments.evaluation.zero_shot import ZeroShotResult


@pytest.fixture
def report(gallery) -> EvalReport:
    retrieval = retrieval_metrics(gallery.image_NE, gallery.text_ME, gallery.text_to_image_M)
    naming = ZeroShotResult(
        acc1=0.25,
        acc5=None,
        mean_per_class_recall=0.2,
        chance_acc1=0.25,
        chance_acc5=None,
        confusions=[("chien", "châtaigne", 3)],
        num_images=8,
        num_classes=4,
    )
    swap = ChoiceResult(share=0.75, standard_error=0.05, num_pairs=75)
    return EvalReport(
        sections={
            "retrieval": retrieval_section(retrieval),
            "naming": zero_shot_section(naming, "drawing"),
            "told_apart": choices_section({"noun_swap": swap}),
        },
        context={"split": "unseen", "step": 10},
        confusions={"naming": naming.confusions},
    )


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "new" / "eval.json"
    report.write_json(path)
    assert EvalReport.read_json(path) == report
    metric = json.loads(path.read_text(encoding="utf-8"))["sections"]["told_apart"]["noun_swap"]
    assert (metric["value"], metric["chance"], metric["n"]) == (0.75, 0.5, 75)
    assert "ties against the model" in metric["protocol"]


def test_interrupted_write_keeps_the_old_file_and_leaves_nothing(report, tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    path.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"eval\.json: could not be written \(No space"):
        report.write_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_format_is_refused(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format_version is 99"):
        EvalReport.read_json(path)


def test_table_shows_value_beside_chance(report):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table())
    lines = console.export_text().splitlines()
    (swap,) = [line for line in lines if "noun_swap" in line]
    assert "75.0 % ± 5.0" in swap
    assert "50.0 %" in swap
    assert "75" in swap
    assert not any("acc5" in line for line in lines)
    (recall,) = [line for line in lines if "text_to_image_R@1 " in line]
    assert "14.3 %" in recall


def test_scalars(report, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        report.log(writer, step=10)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {f"eval/{section}/{name}" for section, ms in report.sections.items() for name in ms}
    assert set(events.Tags()["scalars"]) == tags
    (event,) = events.Scalars("eval/told_apart/noun_swap")
    assert (event.step, event.value) == (10, 0.75)
