"""Axes become cells; a file that says something impossible is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentmodal.experiments.ablation.config import (
    find_ablation,
    read_ablation,
    shipped_ablations,
)
from latentmodal.experiments.ablation.expand import expand, patches
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import shipped_recipes


@pytest.fixture
def write(ablation_file: Path) -> Path:
    """The file with axes of all three kinds."""
    text = ablation_file.read_text().replace(
        "axes:\n  optim.lr: [1e-3, 3e-3]\n",
        """
recipe: {optim: {warmup_steps: "${warm}"}}
axes:
  tower:
    small: null
    other:
      system: {text_encoder: {depth: "${warm}"}}
      description: "${tower} of ${warm}"
  optim.lr: [1e-3, 0.002]
  warm: [2, 3]
leave_out:
  - {tower: other, optim.lr: 0.001}
  - {tower: small, warm: 3}
against: {tower: other, warm: 2}
""",
    )
    ablation_file.write_text(text)
    return ablation_file


def test_every_combination_but_those_left_out(write: Path, tmp_path: Path) -> None:
    plan = expand(read_ablation(str(write)))
    assert [cell.label for cell in plan.cells] == [
        "tower=small,optim.lr=0.001,warm=2",
        "tower=small,optim.lr=0.002,warm=2",
        "tower=other,optim.lr=0.002,warm=2",
        "tower=other,optim.lr=0.002,warm=3",
    ]
    assert plan.reference is plan.cells[2]
    last = plan.cells[-1]
    assert last.axes == {"tower": "other", "optim.lr": "0.002", "warm": "3"}
    recipe = last.recipe(seed=4, folder=tmp_path / "run", max_steps=9)
    assert (recipe.optim.lr, recipe.optim.warmup_steps) == (0.002, 3)
    assert recipe.system.text_encoder.depth == 3
    assert recipe.description == "other of 3"
    assert (recipe.seed, recipe.folder, recipe.trainer.max_steps) == (4, str(tmp_path / "run"), 9)


def test_changes_are_those_from_the_base_alone(write: Path) -> None:
    first, second, third, _ = expand(read_ablation(str(write))).cells
    assert first.changes == (("optim.lr", 0.002, 0.001),)
    assert second.changes == ()
    assert ("system.text_encoder.depth", 1, 2) in third.changes


def test_a_replaced_component_is_one_change_and_what_all_share_is_told_once(
    write: Path,
) -> None:
    plan = expand(
        read_ablation(
            str(write),
            [
                "recipe.data.features=auto",
                "axes.tower.other.system.text_encoder={name: transformer, width: 16}",
                "axes.tower.small.system.tokenizer={name: transformers, model: clip}",
            ],
        )
    )
    assert plan.common == (("data.features", None, "auto"),)
    (change,) = [c for c in plan.cells[0].changes if c[0].startswith("system")]
    key, old, new = change
    assert (key, old) == ("system.tokenizer", "word")
    assert (new["name"], new["model"]) == ("transformers", "clip")


def test_the_digest_is_of_what_a_cell_computes(write: Path) -> None:
    plain = expand(read_ablation(str(write)))
    longer = expand(read_ablation(str(write), ["recipe.trainer.max_steps=99"]))
    other = expand(read_ablation(str(write), ["recipe.data.loader.batch_size=4"]))
    digests = [[cell.digest for cell in plan.cells] for plan in (plain, longer, other)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])
    assert len(set(digests[0])) == 4


def test_another_measure_takes_the_place_of_the_budget(ablation_file: Path) -> None:
    budget = read_ablation(str(ablation_file), ["budget.samples=64"]).budget
    assert (budget.measure, budget.amount) == ("samples", 64.0)


def test_the_resolved_file_reads_back(write: Path, tmp_path: Path) -> None:
    config = read_ablation(str(write), ["workers.count=3"])
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert read_ablation(str(copy)) == config
    assert config.workers.count == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budgets.steps=3"], r"budgets: no such key; did you mean 'budget'\?"),
        (["budget.epochs=3"], r"budget.epochs: no such key"),
        (["budget={steps: 3, tokens: 4}"], r"budget: steps and tokens given; give exactly one"),
        (["budget.steps=0"], r"budget: steps is 0; it must be above 0"),
        (["budget.steps=many"], r"budget.steps: .*many"),
        (["seeds=3"], r"seeds: expected a list, got 3: write \[3\]"),
        (["metrics=a/b"], r"metrics: expected a list, got 'a/b': write \[a/b\]"),
        (["seeds=[]"], r"seeds: \[\]; give at least one"),
        (["seeds=[1,1]"], r"seeds: \[1, 1\]; give at least one, each once"),
        (["metrics=[recall]"], r"metrics: 'recall' names no metric; write section/metric"),
        (["metrics=[]"], r"metrics: is empty"),
        (["metrics=[unseen_pair/R@1]"], r"no cell has a task unseen_pair .*mean 'unseen_pairs'"),
        (["name=a/b"], r"name: 'a/b' is to name a folder"),
        (["workers.engine=slurm"], r"workers: engine is 'slurm'; choose from local, submitit, ray"),
        (["workers.options.gpus=1"], r"workers: options: gpus means nothing to engine local"),
        (["axes=null"], r"axes: is missing or empty"),
        (["axes.warm=3"], r"axes.warm: expected label: patch, or a list of values; got 3"),
        (["axes.optim.lr=[1,1]"], r"axes.optim: expected a patch|axes.optim"),
        (["axes.tower.other=7"], r"axes.tower.other: expected a patch of the recipe, got 7"),
        (["axes.warm=[2,2]"], r"axes.warm: 2 stands there twice"),
        (["axes.more=[1,2]"], r"are the same recipe: an axis of values is a dotted key"),
        (["recipe.optim.warmup_steps='${wram}'"], r"no axis is called wram; did you mean 'warm'"),
        (["recipe.optim.lrr=1"], r"optim.lrr: no such key"),
        (["axes.tower.other.system.text_encoder.depth=deep"], r"cell tower=other.*depth"),
        (["leave_out=[{towre: other}]"], r"leave_out\[0\]: no axis is called towre; did you mean"),
        (["leave_out=[{tower: big}]"], r"leave_out\[0\]: axis tower has no big; choose from small"),
        (["leave_out=[{}]"], r"leaves no cell to run"),
        (["against.tower=big"], r"against: axis tower has no big"),
        (["against={tower: small, warm: 3}"], r"against: this cell is left out"),
        (["against={tower: small}"], r"against: fits 2 cells; give a value of optim.lr, too"),
        (["base=clip/emojy"], r"recipe 'clip/emojy': .*did you mean 'clip/emoji'"),
    ],
)
def test_mistakes_are_refused_in_one_line(write: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        expand(read_ablation(str(write), overrides))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", shipped_ablations())
def test_shipped_ablations_are_found_and_are_no_recipes(name: str) -> None:
    assert find_ablation(name) == find_ablation(f"ablations/{name}")
    config = read_ablation(name)
    assert config.name == name
    assert len(expand(config).cells) == len(patches(config)) > 1
    assert not [recipe for recipe in shipped_recipes() if "ablation" in recipe]
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        find_ablation(f"{name}x")


def test_a_recipe_is_no_ablation() -> None:
    with pytest.raises(UserError, match=r"^'clip/emoji' is a recipe: .* says `base: clip/emoji`"):
        find_ablation("clip/emoji")
