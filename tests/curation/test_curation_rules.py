"""The rules by which descriptions are dropped and measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentmodal.experiments.curation.filtering import filter_ledger
from latentmodal.experiments.curation.ledger import Generated, Ledger, Refined, Reviewed
from latentmodal.experiments.curation.rules import (
    Rules,
    broken_sentences,
    find_fault,
    is_unfinished,
    nonsense_characters,
    repeated_ngrams,
    repeated_sentences,
    sentences,
    word_repetition,
    words,
)

GOOD = "A brown dog sits on a red sofa. Behind it stands a lamp, and its light is on."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. X is 3.5 m tall, e.g. big. He sat", ["Mr. X is 3.5 m tall, e.g. big.", "He sat"]),
        ('He said "go." Then he left.', ['He said "go."', "Then he left."]),
        ("这是猫。那是狗。", ["这是猫。", "那是狗。"]),
        ("", []),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert sentences(text) == found


@pytest.mark.parametrize(
    ("measure", "text", "value"),
    [
        (word_repetition, "a red Red, red. red bus", 4),
        (word_repetition, "a red bus", 1),
        (word_repetition, "", 0),
        (lambda text: repeated_ngrams(text, 2), "a b a b a b", 1 - 2 / 5),
        (lambda text: repeated_ngrams(text, 4), "a b c", 0.0),
        (repeated_sentences, "A cat. A dog. a CAT! A cat.", 2),
        (repeated_sentences, GOOD, 0),
        (is_unfinished, GOOD, False),
        (is_unfinished, "A dog sits on", True),
        (is_unfinished, "A dog sits on the.", True),
        (is_unfinished, "A dog sits ...", True),
        (is_unfinished, "A dog sits…", True),
        (is_unfinished, 'It says "stop!"', False),
        (is_unfinished, "", True),
        (broken_sentences, "A cat and a. A dog.", ["A cat and a."]),
        (nonsense_characters, GOOD + " “Quoted” – naïve café 猫 😀\n", 0),
        (nonsense_characters, "a\x00b\ufffd\ue000", 3),
        (nonsense_characters, "so!!!!! ###", 8),
        (nonsense_characters, "text</s><|im_end|>", 14),
        (nonsense_characters, "wait...", 0),
        (words, "It's a well-known Café", ["it's", "a", "well-known", "café"]),
    ],
)
def test_measures(measure: Callable[[str], object], text: str, value: object) -> None:
    assert measure(text) == value


@pytest.mark.parametrize(
    ("text", "options", "name"),
    [
        (GOOD, {}, None),
        ("A dog.", {}, "too_short"),
        (GOOD, {"max_words": 11}, "too_long"),
        (GOOD + " ###", {}, "nonsense_characters"),
        (GOOD + " ###", {"max_nonsense": 3, "finished": False, "max_broken": 1}, None),
        (GOOD + " It is very very very red.", {}, "word_repetition"),
        (GOOD + " It is very very very red.", {"max_word_run": 3}, None),
        (GOOD + " " + GOOD, {}, "sentence_repetition"),
        (
            "On the left side of the room is a cat, on the left side of the room is a dog, on the "
            "left side of the room is a cow.",
            {},
            "ngram_repetition",
        ),
        (GOOD + " There is also a", {}, "unfinished_sentence"),
        (GOOD + " There is also a", {"finished": False}, None),
        ("The lamp stands on the. " + GOOD, {}, "broken_sentence"),
        ("The lamp stands on the. " + GOOD, {"max_broken": 1}, None),
    ],
)
def test_the_first_broken_rule_is_the_reason(
    text: str, options: dict[str, int], name: str | None
) -> None:
    fault = find_fault(text, Rules(**options))  # type: ignore[arg-type]
    assert (fault.partition(":")[0] if fault else None) == name


@pytest.mark.parametrize(
    "options", [{"min_words": 9, "max_words": 3}, {"ngram": 0}, {"max_ngram_share": 2}]
)
def test_bad_rules_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Rules(**options)  # type: ignore[arg-type]


def test_the_newest_filter_counts_and_a_person_stands_above_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    texts = {"good": GOOD, "short": "A dog sits.", "person": "A cat."}
    ledger.append(*(Generated(id=i, by="m", image=i, text=t) for i, t in texts.items()))
    ledger.append(Reviewed(id="person", by="anna", decision="keep"))

    counts = filter_ledger(ledger, Rules(), by="rules")
    assert counts == {"kept": 1, "too_short": 1, "reviewed": 1}
    assert ledger.records()["short"].dropped == "too_short: 3 words"
    assert not ledger.records()["person"].filtered

    before = ledger.path.read_bytes()
    assert filter_ledger(ledger, Rules(), by="rules") == counts
    assert ledger.path.read_bytes() == before

    assert filter_ledger(ledger, Rules(min_words=2), by="rules")["kept"] == 2
    assert ledger.records()["short"].dropped is None

    ledger.append(Refined(id="good", by="m", text="A dog"))  # judged again as another text
    ledger.close()
    assert filter_ledger(ledger, Rules(min_words=1), by="rules")["unfinished_sentence"] == 1
    assert [record.id for record in ledger if record.dropped] == ["good"]
