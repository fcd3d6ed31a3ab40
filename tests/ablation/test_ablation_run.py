"""What is done is skipped, what is not is run, what fails is told; another ablation is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import main
from finished_runs import sections
from latentmodal.experiments.ablation import folder as ablation_folder
from latentmodal.experiments.ablation.config import read_ablation
from latentmodal.experiments.ablation.records import cells_of, find_runs, read_run
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.training.checkpoints import latest_checkpoint

Ablate = Callable[..., tuple[list[Any], str]]
FIRST, SECOND = "optim.lr=0.001", "optim.lr=0.003"


def test_runs_are_kept_and_only_what_is_new_is_run(
    ablation_file: Path, ablate: Ablate, engine: Any, comparisons: list[Any], tmp_path: Path
) -> None:
    failed, text = ablate(ablation_file)
    assert not failed
    assert engine.trained() == [f"{FIRST}/seed0", f"{SECOND}/seed0"]
    assert f"[2/2] {SECOND} seed 0: unseen_pairs/image_to_text_R@1" in text
    cells = cells_of([read_run(path) for path in find_runs([tmp_path / "out"])])
    assert [cell.label for cell in cells] == [FIRST, SECOND]
    assert [len(cell.usable) for cell in cells] == [1, 1]
    assert cells[1].axes == {"optim.lr": "0.003"}
    assert cells[1].runs[0].keys["trainer.max_steps"] == 3
    (asked,) = comparisons
    assert [path.parent.name for path in asked[0]] == [FIRST, SECOND]
    assert asked[1] == {
        "metrics": ("unseen_pairs/image_to_text_R@1",),
        "against": FIRST,
        "out": tmp_path / "out" / "report",
        "board": tmp_path / "out" / "tensorboard",
    }
    # Again: nothing, not even measuring.
    engine.started.clear()
    ablate(ablation_file)
    assert engine.started == []
    # A seed and a cell more.
    ablate(ablation_file, "seeds=[0,1]", "axes={optim.lr: [1e-3, 3e-3, 5e-3]}")
    assert engine.trained() == [
        "optim.lr=0.005/seed0",
        f"{FIRST}/seed1",
        f"{SECOND}/seed1",
        "optim.lr=0.005/seed1",
    ]
    with pytest.raises(UserError, match=r"cell optim.lr=0.005 is gone; seed 1 is gone"):
        ablate(ablation_file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget.steps=4"], r"\(budget.steps was 3, is 4\); only cells and seeds may be added"),
        (["budget.tokens=4"], r"budget.steps was 3, is null; budget.tokens was null, is 4"),
        (["recipe.optim.eps=1e-5"], r"recipe.optim was \(absent\), is"),
        (["axes={optim.lr: [1e-3, 4e-3]}"], r"cell optim.lr=0.003 is gone"),
        (["seeds=[1]"], r"seed 0 is gone"),
    ],
)
def test_another_ablation_in_the_folder_is_refused(
    ablation_file: Path, ablate: Ablate, engine: Any, overrides: list[str], message: str
) -> None:
    config = read_ablation(str(ablation_file))
    folder = ablation_folder.AblationFolder(config.path)
    folder.path.mkdir()
    folder.file.write_text(config.to_yaml())
    with pytest.raises(UserError, match=message) as refused:
        ablate(ablation_file, *overrides)
    assert "\n" not in str(refused.value)
    assert engine.started == []
    assert folder.file.read_text() == config.to_yaml()


def test_a_base_that_changed_is_refused(ablation_file: Path, ablate: Ablate) -> None:
    ablate(ablation_file, "axes={optim.lr: [1e-3]}")
    base = ablation_file.with_name("tiny.yaml")
    base.write_text(base.read_text().replace("batch_size: 8", "batch_size: 4"))
    with pytest.raises(UserError, match=r"another recipe \(data.loader.batch_size was 8, is 4\)"):
        ablate(ablation_file, "axes={optim.lr: [1e-3]}")


def test_a_failing_cell_does_not_stop_the_others(
    ablation_file: Path, ablate: Ablate, engine: Any, tmp_path: Path, emoji_cache: Path
) -> None:
    # The first cannot be built, so it is not tried; the second stops when its training begins.
    source = f"{{name: shards, urls: {tmp_path}/x.tar}}"
    lost = f"evaluation: {{tasks: {{unseen_pairs: {{source: {source}}}}}}}"
    cells = f"{{typo: {{freeze: {{'hed.*': frozen}}}}, lost: {{{lost}}}, good: {{}}}}"
    axes = f"axes={{optim.lr: null, which: {cells}}}"
    samples = "budget.samples=24"  # how many steps that is has to be measured
    failed, text = ablate(ablation_file, axes, samples)
    assert [job.cell.label for job in failed] == ["which=typo", "which=lost"]
    assert engine.trained() == ["which=lost/seed0", "which=good/seed0"]
    assert "pattern 'hed.*' matches no parameter" in failed[0].failure
    assert "evaluation.tasks.unseen_pairs.source: " in failed[1].failure
    assert "which=lost seed 0: failed: evaluation.tasks" in text
    records = {record.label: record for record in map(read_run, find_runs([tmp_path / "out"]))}
    assert records["which=good"].problem is None
    assert str(records["which=typo"].problem).startswith("failed: ")
    # Only what failed is tried again; here its data came back.
    (tmp_path / "x.tar").symlink_to(next(emoji_cache.rglob("unseen_pairs/*.tar")))
    engine.started.clear()
    failed, _ = ablate(ablation_file, axes, samples)
    assert engine.trained() == ["which=lost/seed0"]
    assert [job.cell.label for job in failed] == ["which=typo"]
    assert not (tmp_path / "out" / "cells" / "which=lost" / "seed0" / "failed.json").exists()


def test_a_budget_of_steps_needs_no_measuring(
    ablation_file: Path, ablate: Ablate, engine: Any
) -> None:
    axes = "axes={optim.lr: null, which: {typo: {freeze: {'hed.*': frozen}}, good: {}}}"
    failed, text = ablate(ablation_file, axes)
    assert "measuring" not in text
    assert engine.trained() == ["which=typo/seed0", "which=good/seed0"]
    assert [job.cell.label for job in failed] == ["which=typo"]
    assert "pattern 'hed.*' matches no parameter" in failed[0].failure


def test_an_ablation_of_nothing_but_failures_says_the_first(
    ablation_file: Path, ablate: Ablate
) -> None:
    with pytest.raises(UserError, match=r"every run failed; the first: .*'hed.\*'"):
        ablate(ablation_file, "recipe.freeze={'hed.*': frozen}")


def test_a_stopped_run_goes_on_from_its_checkpoint(
    ablation_file: Path, ablate: Ablate, engine: Any, tmp_path: Path
) -> None:
    ablate(ablation_file)
    path = tmp_path / "out" / "cells" / SECOND / "seed0"
    whole = sections(path / "eval.json")
    for name in ("finished.json", "eval.json", "cost.json"):
        (path / name).unlink()
    last = latest_checkpoint(path / "checkpoints")
    assert last is not None
    last.unlink()  # of step 3; that of step 2 is left
    engine.started.clear()
    ablate(ablation_file)
    assert engine.trained() == [f"{SECOND}/seed0"]
    assert sections(path / "eval.json") == whole
    assert json.loads((path / "cost.json").read_text())["steps"] == 3


def test_two_processes_do_not_share_a_folder(ablation_file: Path, ablate: Ablate) -> None:
    folder = ablation_folder.AblationFolder(read_ablation(str(ablation_file)).path)
    with folder.lock(), pytest.raises(UserError, match=r"process \d+ on .* works here; wait"):
        ablate(ablation_file)
    shutil.rmtree(folder.path)
    with folder.lock():  # let go of: the file that stays does not matter
        assert (folder.path / ".lock").is_file()
    with folder.lock():
        pass


def test_a_folder_that_is_none_is_one_line(
    ablation_file: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert main("ablate", ablation_file, "--folder", tmp_path / "taken") == 2
    assert (
        "taken: cannot be written (File exists); give another --folder" in capsys.readouterr().err
    )


def test_dry_run_prints_cells_costs_and_changes(
    ablation_file: Path, engine: Any, capsys: Any, monkeypatch: Any
) -> None:
    from latentmodal.experiments.ablation import workers

    monkeypatch.setattr(workers, "build_engine", lambda *_: engine)
    command = ("ablate", ablation_file, "seeds=[0,1]", "budget.samples=80", "--dry-run")
    assert main(*command, "recipe.optim.eps=1e-5") == 0
    text = capsys.readouterr().out
    assert "every cell optim.eps: 1e-06 -> 1e-05" in text
    (row,) = [line for line in text.splitlines() if line.startswith(SECOND)]
    assert row.split()[1] == "70,767"
    assert row.split()[5] == "10"  # steps of 8 samples
    assert row.endswith("optim.lr: 0.002 -> 0.003")
    assert "2 cells x 2 seeds = 4 runs, 4 to do" in text
    assert engine.trained() == []
    assert len(engine.started) == 1
    main(*command, "recipe.optim.eps=1e-5")  # measured already
    assert len(engine.started) == 1
    capsys.readouterr()
    assert main(*command, "recipe.freeze={'hed.*': frozen}") == 1, "no cell can be trained"
    text = capsys.readouterr().out
    assert "2 cells x 2 seeds = 4 runs, 0 to do" in text
    assert text.count("failed: ") == 2 and "pattern 'hed.*' matches no parameter" in text
    assert main("ablate", ablation_file, "budgets.steps=1") == 2
    assert capsys.readouterr().err.startswith("error: ")
