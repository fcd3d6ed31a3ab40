"""Variations of BLIP-2's two stages train on tiny scenes."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import main
from finished_runs import Chain, assert_finite, checkpoint, events, sections
from latentmodal.experiments.recipe import find_recipe

VARIATIONS = {
    "linear": """
system: {bridge: {name: linear}, pretrained: null}
""",
    "lora": """
system: {llm: {lora: {rank: 2}}}
freeze: {"*lora_*": 1.0, "image_encoder.*": frozen, "llm.*": frozen}
""",
}


@pytest.mark.parametrize(
    ("shipped", "queries", "absent_scalars", "absent_weights"),
    [
        ("no_itg", 8, {"train/itg"}, "model.bridge.caption_head."),
        ("no_itm", 8, {"train/itm", "train/itm_accuracy"}, "model.head.itm_head."),
        ("16_queries", 16, set(), None),
    ],
)
def test_the_shipped_variations_of_stage_1_run(
    blip2_chain: Chain,
    tmp_path: Path,
    shipped: str,
    queries: int,
    absent_scalars: set[str],
    absent_weights: str | None,
) -> None:
    """The shipped files themselves, with the tiny recipe under them."""
    text = find_recipe(f"blip2/stage1_emoji_{shipped}").read_text()
    assert "base: blip2/stage1_emoji\n" in text
    recipe = tmp_path / "variation.yaml"
    recipe.write_text(text.replace("blip2/stage1_emoji\n", f"{blip2_chain.recipe('stage1')}\n"))
    run = tmp_path / "run"
    assert main("fit", recipe, f"run_dir={run}", "trainer.max_steps=2") == 0
    state = checkpoint(run)["state_dict"]
    assert state["model.bridge.queries"].shape == (1, queries, 32)
    if absent_weights is not None:
        whole = checkpoint(blip2_chain.run("stage1"))["state_dict"]
        assert any(name.startswith(absent_weights) for name in whole)
        assert not any(name.startswith(absent_weights) for name in state)
    shown = set(events(run).Tags()["scalars"])
    every = {f"train/{name}" for name in ("itc", "itm", "itg", "itm_accuracy")}
    assert every - shown == absent_scalars
    assert_finite(sections(run / "eval.json"))


@pytest.mark.parametrize(
    ("name", "trains"),
    [("linear", {"bridge.proj"}), ("lora", {"bridge.queries", "llm.model"})],
)
def test_variations_of_stage_2_run(
    blip2_chain: Chain, tmp_path: Path, name: str, trains: set[str]
) -> None:
    recipe, run = tmp_path / "variation.yaml", tmp_path / "run"
    recipe.write_text(f"base: {blip2_chain.recipe('stage2')}\nname: mine\n{VARIATIONS[name]}")
    assert main("fit", recipe, f"run_dir={run}", "trainer.max_steps=2") == 0
    state = checkpoint(run)["state_dict"]
    assert trains <= {".".join(key.split(".")[1:3]) for key in state}
    of_llm = [key for key in state if key.startswith("model.llm.")]
    assert all("lora_" in key for key in of_llm)
    assert main("eval", run) == 0
