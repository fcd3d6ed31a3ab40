"""Folders of runs become cells with means, differences and verdicts; nothing drops out unseen."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from fabricated_runs import cost, fabricate_ablation, fabricate_run
from latentmodal.experiments.ablation.comparison import Comparison
from latentmodal.experiments.ablation.curve_data import metric_points
from latentmodal.experiments.ablation.records import cells_of, find_runs, read_run
from latentmodal.experiments.ablation.summary import summarize
from latentmodal.experiments.ablation.tables import csv_text, markdown
from latentmodal.experiments.ablation.wording import headline
from latentmodal.experiments.errors import UserError

BEST, REFERENCE = "bridge=c_abstractor,tokens=36", "bridge=average_pool,tokens=9"


def compared(*folders: Path, **options: object) -> Comparison:
    return summarize([read_run(folder) for folder in find_runs(folders)], **options)


def plain_run(folder: Path, lr: float, seed: int, values: dict[str, float | None]) -> Path:
    recipe = {"name": "quick", "optim": {"lr": lr}, "seed": seed, "run_dir": str(folder)}
    return fabricate_run(folder, recipe=recipe, values=values, cost=cost(1000, 9, 0.1))


def test_an_ablation_brings_its_own_metrics_reference_and_budget(tmp_path: Path) -> None:
    found = compared(fabricate_ablation(tmp_path))
    assert found.name == "bridges" and found.reference == REFERENCE
    assert list(found.metrics) == ["pairs/CIDEr-D", "pairs/names_recall", "pairs/CHAIRi"]
    assert found.budget == "300 steps" and found.seeds == [0, 1, 2]
    assert len(found.cells) == 8 and not found.problems and not found.notes
    assert found.ranked()[0].label == BEST
    assert found.ranked("pairs/CHAIRi")[0].label == BEST  # lower is better there
    verdicts = {
        cell.label: cell.findings["pairs/CIDEr-D"].difference.verdict for cell in found.cells
    }
    assert verdicts[BEST] == "better" and verdicts[REFERENCE] == "reference"
    assert verdicts["bridge=qformer,tokens=9"] == "worse"
    chair = {cell.label: cell.findings["pairs/CHAIRi"].difference.verdict for cell in found.cells}
    assert chair[BEST] == "better" and chair["bridge=qformer,tokens=9"] == "worse"
    best = found.ranked()[0]
    assert (best.trainable_parameters, best.tokens, best.step_seconds) == (640_000, 460_800, 0.11)
    assert headline(found).startswith(f"{BEST} has the highest pairs/CIDEr-D, ")
    assert "at 300 steps each: a real difference to " in headline(found)


def test_means_and_errors_are_those_of_the_seeds(tmp_path: Path) -> None:
    for seed, value in enumerate((1.0, 2.0, 4.5)):
        plain_run(tmp_path / f"a{seed}", 0.1, seed, {"acc": value})
        plain_run(tmp_path / f"b{seed}", 0.2, seed, {"acc": value + 1})
    found = compared(tmp_path)
    assert [cell.label for cell in found.cells] == ["lr=0.1", "lr=0.2"]
    finding = found.cells[0].findings["pairs/acc"]
    assert finding.mean == pytest.approx(2.5)
    assert finding.standard_error == pytest.approx(1.0408, rel=1e-4)
    assert found.cells[1].findings["pairs/acc"].difference.value == pytest.approx(1)
    assert found.differing == ("optim.lr",)


def test_runs_that_failed_or_are_not_finished_are_named(tmp_path: Path) -> None:
    folder = fabricate_ablation(tmp_path)
    failed, stopped, blank = (
        folder / "cells" / "bridge=resampler,tokens=36" / f"seed{seed}" for seed in range(3)
    )
    (failed / "failed.json").write_text(json.dumps({"reason": "out of memory"}))
    (stopped / "finished.json").unlink()
    (blank / "eval.json").unlink()
    found = compared(folder)
    assert [(problem.seed, problem.reason) for problem in found.problems] == [
        (0, "failed: out of memory"),
        (1, "unfinished"),
        (2, "not evaluated"),
    ]
    assert any("no value for bridge=resampler,tokens=36" in note for note in found.notes)
    text = markdown(found)
    assert "not compared: bridge=resampler,tokens=36 seed 0: failed: out of memory" in text
    assert "| bridge=resampler,tokens=36 | 0 | – |" in text


def test_a_missing_seed_does_not_move_the_ranking(tmp_path: Path) -> None:
    # The second seed is a hard one; who did not run it has the higher mean.
    for seed, value in enumerate((5.0, 1.0, 5.2)):
        plain_run(tmp_path / f"a{seed}", 0.1, seed, {"acc": value})
        if seed != 1:
            plain_run(tmp_path / f"b{seed}", 0.2, seed, {"acc": value - 0.5})
    found = compared(tmp_path)
    assert [cell.label for cell in found.ranked()] == ["lr=0.1", "lr=0.2"]
    assert found.cells[1].findings["pairs/acc"].difference.value == pytest.approx(-0.5)


def test_one_seed_gives_no_verdict(tmp_path: Path) -> None:
    found = compared(fabricate_ablation(tmp_path, seeds=1))
    verdicts = {cell.findings["pairs/CIDEr-D"].difference.verdict for cell in found.cells}
    assert verdicts == {"one seed", "reference"}
    assert found.notes == (
        "one seed: how much of a difference is chance cannot be said; run more seeds",
    )
    assert headline(found).endswith("but with one seed nobody can say whether that is chance.")


def test_cells_without_a_common_seed_are_not_called_alike(tmp_path: Path) -> None:
    for seed in range(4):
        plain_run(tmp_path / f"run{seed}", 0.1 if seed < 2 else 0.2, seed, {"acc": 0.1 * seed})
    found = compared(tmp_path)
    assert found.cells[1].findings["pairs/acc"].difference.verdict == "no common seed"
    assert headline(found).endswith(
        "but it shares no seed with the other cell, so there is no verdict."
    )


def test_budgets_that_are_not_known_are_not_called_unequal(tmp_path: Path) -> None:
    for row, lr in enumerate((0.1, 0.2)):
        (plain_run(tmp_path / f"run{row}", lr, 0, {"acc": 0.5}) / "cost.json").unlink()
    assert "(budgets are not known): but with one seed" in headline(compared(tmp_path))


def test_a_reference_may_be_given_by_any_value_of_a_recipe(tmp_path: Path) -> None:
    home = tmp_path / "cells"
    for value in ("false", "null", "true"):
        run = plain_run(home / f"flip={value}" / "seed0", 0.1, 0, {"acc": 0.5})
        cell = {"ablation": "flips", "seed": 0, "label": f"flip={value}", "axes": {"flip": value}}
        (run / "cell.json").write_text(json.dumps(cell))
    for value in ("null", "true"):
        (tmp_path / "ablation.yaml").write_text(f"name: flips\nagainst: {{flip: {value}}}\n")
        assert compared(tmp_path).reference == f"flip={value}"


def test_a_broken_evaluation_on_the_way_is_named(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "a", 0.1, 0, {"acc": 0.5})
    (run / "evaluations" / "step=00000100.json").write_text("{")
    with pytest.raises(UserError, match=r"step=00000100\.json: is broken"):
        metric_points(read_run(run), ["pairs/acc"])


def test_metrics_default_to_what_every_run_has(tmp_path: Path) -> None:
    plain_run(tmp_path / "a", 0.1, 0, {"acc": 0.5, "CIDEr-D": 1.0, "rare": 1.0})
    plain_run(tmp_path / "b", 0.2, 0, {"acc": None, "CIDEr-D": 1.2})
    found = compared(tmp_path)
    assert list(found.metrics) == ["pairs/CIDEr-D", "pairs/acc"]
    assert found.cells[1].findings["pairs/acc"].difference.verdict == "no value"
    assert list(compared(tmp_path, metrics=["pairs/rare"]).metrics) == ["pairs/rare"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["pairs/CIDErD"]}, "did you mean 'pairs/CIDEr-D'"),
        ({"against": "bridge=qformer,tokens=8"}, "did you mean 'bridge=qformer,tokens=9'"),
    ],
)
def test_unknown_names_get_a_hint(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(fabricate_ablation(tmp_path), **options)


def test_folders_without_a_comparable_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "absent"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: is a file; give folders of runs"):
        find_runs([tmp_path / "file"])
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])
    run = plain_run(tmp_path / "a", 0.1, 0, {"acc": 0.5})
    (run / "finished.json").unlink()
    with pytest.raises(UserError, match=r"no run to compare; the first: .*a: unfinished"):
        compared(tmp_path)
    (run / "eval.json").write_text("{")
    with pytest.raises(UserError, match=r"eval\.json: is broken"):
        compared(tmp_path)


def test_two_runs_of_one_seed_in_a_cell_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        plain_run(tmp_path / name, 0.1, 0, {"acc": 0.5})
    with pytest.raises(UserError, match="both are seed 0 of the cell"):
        compared(tmp_path)


def test_cells_of_recipes_are_called_by_what_differs(tmp_path: Path) -> None:
    for row, (lr, seed) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0)]):
        plain_run(tmp_path / f"run{row}", lr, seed, {"acc": 0.5})
    cells = cells_of([read_run(path) for path in find_runs([tmp_path])])
    assert [(cell.label, len(cell.runs)) for cell in cells] == [("lr=0.1", 2), ("lr=0.2", 1)]


def test_another_measurement_is_noted(tmp_path: Path) -> None:
    for split in ("seen", "unseen"):
        tasks = {"tasks": {"pairs": {"source": {"split": split}}}}
        recipe = {"name": "quick", "evaluation": tasks, "seed": 0}
        fabricate_run(tmp_path / split, recipe=recipe, values={"acc": 0.5})
    notes = compared(tmp_path).notes
    assert any("pairs: was not measured alike, evaluation.tasks.pairs.source" in n for n in notes)
    assert any(note.startswith("2 of 2 runs left no cost.json") for note in notes)


def test_csv_holds_every_number(tmp_path: Path) -> None:
    found = compared(fabricate_ablation(tmp_path))
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == 8 * 3
    row = next(r for r in rows if r["cell"] == BEST and r["metric"] == "pairs/CIDEr-D")
    finding = found.ranked()[0].findings["pairs/CIDEr-D"]
    assert [float(v) for v in row["values"].split()] == list(finding.values.values())
    assert (row["bridge"], row["tokens"], row["verdict"]) == ("c_abstractor", "460800.0", "better")
