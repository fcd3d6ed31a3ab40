"""Mending without a model: the form of a text, and nothing of what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import main
from latentmodal.experiments.curation.ledger import Generated, Ledger
from latentmodal.experiments.curation.rules import (
    Rules,
    broken_sentences,
    find_fault,
    nonsense_characters,
    repeated_sentences,
)
from latentmodal.experiments.curation.tidying import tidy

TEXTS = [
    ("a snail below a frog", "A snail below a frog."),
    ("A snail.", "A snail."),
    ("a snail,  below\n a frog -", "A snail, below a frog."),
    ("a snail below a frog...", "A snail below a frog."),
    ("A dog runs. It sees a cat. a dog runs!", "A dog runs. It sees a cat."),
    ("A dog runs. It sees a", "A dog runs."),
    ("A dog runs. It sees a cat", "A dog runs."),
    ("The dog is with a. It runs.", "It runs."),
    ("a dog\0 runs!!!!! ###Human: it", "A dog runs!"),
    ("A dog of 3.5 kg, says Mr. Smith.", "A dog of 3.5 kg, says Mr. Smith."),
    ("一只狗。一只狗。", "一只狗。"),
    ("a dog with a", ""),
    ("...", ""),
    ("###", ""),
]


@pytest.mark.parametrize(("text", "mended"), TEXTS)
def test_tidy(text: str, mended: str) -> None:
    assert tidy(text) == mended
    assert tidy(mended) == mended


@pytest.mark.parametrize("text", [text for text, _ in TEXTS])
def test_no_rule_of_form_has_a_complaint(text: str) -> None:
    mended = tidy(text)
    assert not broken_sentences(mended)
    assert not repeated_sentences(mended)
    assert not nonsense_characters(mended)
    assert not mended or find_fault(mended, Rules(min_words=0)) is None


def test_the_command_mends_what_nobody_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ledger.jsonl"
    with Ledger(file) as ledger:
        for name, text in (("a", "a snail below a frog"), ("b", "a dog with a")):
            ledger.append(
                Generated(id=name, by="test", image="images/a.png", text=text, instruction="")
            )
    for tally in ("1 refined, 1 refused, 2", "0 refined, 1 refused, 2"):
        assert main("curate", "refine", str(tmp_path), "--tidy") == 0
        told = capsys.readouterr().out
        assert tally in told and "refused last, because no whole sentence is in it" in told
    mended, refused = Ledger(file)
    assert mended.refined == "A snail below a frog." and refused.refined is None
    assert refused.text == "a dog with a"
