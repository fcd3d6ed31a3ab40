"""Mistakes in a recipe of BLIP-2 are one line, said before anything trains."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blip2_recipes import ASKED, CAPTIONS, ITM, QUESTION
from finished_runs import Chain


@pytest.mark.parametrize(
    ("recipe", "keys", "reason"),
    [
        ("stage1", ["system.image_encoder.path=nowhere"], "nowhere: no run here (recipe.yaml is"),
        ("stage2", ["system.pretrained.path=nowhere"], "nowhere: no run here (recipe.yaml is"),
        ("stage2", ["system.pretrained.path=CLIP"], "is a run without a bridge"),
        ("stage2", ["system.bridge.width=16"], "does not fit the recipe: bridge.queries is"),
        ("stage2", ["system.llm.model=/nowhere/llm"], "'/nowhere/llm' is neither a local folder"),
        ("stage2", ["system.llm.model=CLIP"], "is a folder without config.json"),
        ("stage2", ["system.prompt.text='{image}{bos}'"], "has 0 {answer} fields; write one"),
        ("stage2", ["system.prompt.prefix_split=true"], "prefix_split needs a seq2seq model"),
        ("clip", [CAPTIONS], "evaluation.tasks.said: captions need a system that"),
        ("clip", [ASKED], "evaluation.tasks.asked: questions need a system with a"),
        ("stage1", [ASKED], "evaluation.tasks.asked: questions need a system with a"),
        ("stage1", ["system.objectives.itm=0"], "evaluation.tasks.unseen_pairs_itm: scoring by"),
        ("stage1", ["system.objectives.itc=0"], "evaluation.tasks.unseen_pairs: retrieval, nam"),
        ("stage1", ["system.objectives.itg=0"], "evaluation.tasks.swapped_by_itg: scoring by"),
        ("clip", [ITM], "evaluation.tasks.found: scoring by itm needs"),
        ("stage2", [ITM], "evaluation.tasks.found: retrieval, naming"),
        # What a caption or an answer is asked with lacks or wants the question.
        ("stage2", ["system.target=answer", QUESTION], "evaluation.tasks.unseen_pairs: the prompt"),
        ("stage2", [ASKED], "evaluation.tasks.asked: the prompt"),
    ],
)
def test_a_mistake_is_one_line_and_found_before_training(
    complaint: Callable[..., str], blip2_chain: Chain, recipe: str, keys: list[str], reason: str
) -> None:
    keys = [key.replace("CLIP", str(blip2_chain.run("clip"))) for key in keys]
    assert reason in complaint(recipe, *keys)
