"""Penultimate features, layer decay and the warmup's start, from a recipe file to the table."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from latentmodal.experiments.errors import UserError
from latentmodal.experiments.recipe import load_recipe, to_yaml
from latentmodal.experiments.training.fit import build_system
from latentmodal.experiments.training.freeze import freeze_rows, freeze_table
from latentmodal.experiments.training.layer_decay import layer_multipliers
from latentmodal.experiments.training.run_folder import RunFolder

RECIPE = """
base: {base}
name: tiny-decay
system:
  image_encoder: {{features: penultimate}}
optim:
  lr: 1.0e-3
  warmup_start_lr: 1.0e-6
  layer_decay: {{"{pattern}": 0.5, "text_encoder.*": 1}}
"""


def write(folder: Path, base: Path, pattern: str) -> Path:
    file = folder / "decay.yaml"
    file.write_text(RECIPE.format(base=base, pattern=pattern))
    return file


def test_round_trip_and_table(tiny_recipes: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_recipes / "clip.yaml", "image_encoder.*")
    recipe = load_recipe(str(file))
    assert recipe.optim.layer_decay == {"image_encoder.*": 0.5, "text_encoder.*": 1.0}
    assert recipe.optim.warmup_start_lr == 1e-6
    assert recipe.system.image_encoder.features == "penultimate"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(recipe))
    assert load_recipe(str(again)) == recipe

    system = build_system(recipe, RunFolder(tmp_path / "run"))
    scales = layer_multipliers(system.model, recipe.optim.layer_decay)
    rows = freeze_rows(system.model, system.plan, recipe.optim.lr, layer_scale=scales)
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(freeze_table(rows))
    (line,) = (x for x in console.export_text().splitlines() if "image_encoder.trunk" in x)
    assert "2.50e-04 .. 5.00e-04" in line  # one block is left: 0.5, and 0.5 squared before it


def test_a_wrong_pattern_stops_before_training(tiny_recipes: Path, tmp_path: Path) -> None:
    file = write(tmp_path, tiny_recipes / "clip.yaml", "image_encodr.*")
    with pytest.raises(UserError, match="'image_encodr") as caught:
        build_system(load_recipe(str(file)), RunFolder(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.layer_decay.x=2", "'x' is 2.0; give a number above 0, at most 1"),
        ("optim.layer_decay.x=fast", "layer_decay"),
        ("optim.warmup_start_lr=1", "warmup_start_lr is 1.0; it must lie between 0 and lr"),
        ("system.image_encoder.features=first", "features"),
    ],
)
def test_ill_values_are_one_clear_line(tiny_recipes: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(tiny_recipes / "clip.yaml"), [override])
    assert "\n" not in str(caught.value)
