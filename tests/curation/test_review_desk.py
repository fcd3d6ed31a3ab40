"""The review desk: where records stand, decisions, undo, two tabs, marked differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentmodal.experiments.curation.differences import Piece, mark_versions
from latentmodal.experiments.curation.ledger import (
    Filtered,
    Generated,
    Ledger,
    Record,
    Refined,
    Reviewed,
)
from latentmodal.experiments.curation.review_desk import (
    Desk,
    StaleError,
    UnknownRecordError,
    state_of,
    version_of,
)
from latentmodal.experiments.errors import UserError


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Records a to e; the rules dropped c."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for name in "abcde":
        image = f"images/{name}.png"
        ledger.append(Generated(id=name, by="model", image=image, text=f"A {name} and a {name}."))
        ledger.append(Refined(id=name, by="refiner", text=f"A {name}."))
    ledger.append(Filtered(id="c", by="rules", reason="too_short: 2 words"))
    return Desk(ledger, "ada")


def record_of(desk: Desk, name: str) -> Record:
    return desk.ledger.records()[name]


def decide(desk: Desk, name: str, decision: str, text: str | None = None) -> Record:
    return desk.decide(name, version_of(record_of(desk, name)), decision, text)


def undo(desk: Desk, name: str) -> Record:
    return desk.undo(name, version_of(record_of(desk, name)))


def shown(desk: Desk, *where: Any) -> str | None:
    record = desk.show(*where)["record"]
    return record and record["id"]


def written(desk: Desk) -> list[tuple[str, str | None, str]]:
    """The decisions on the disk: record, decision, by whom."""
    events = [json.loads(line) for line in desk.ledger.path.read_text().splitlines()]
    return [(e["id"], e["decision"], e["by"]) for e in events if e["event"] == "reviewed"]


def test_each_state_has_its_records_and_counts(desk: Desk) -> None:
    decide(desk, "a", "keep")
    decide(desk, "b", "edit", "A mended b.")
    decide(desk, "d", "drop")
    states = {name: state_of(record) for name, record in desk.ledger.records().items()}
    assert states == {"a": "kept", "b": "edited", "c": "rule", "d": "dropped", "e": "open"}
    answer = desk.show("edited")
    assert answer["counts"] == {"open": 1, "kept": 1, "edited": 1, "dropped": 1, "rule": 1}
    assert (answer["total"], answer["record"]["number"]) == (5, 2)
    assert written(desk) == [("a", "keep", "ada"), ("b", "edit", "ada"), ("d", "drop", "ada")]


def test_walking_skips_other_states_and_open_ones_go_round(desk: Desk) -> None:
    assert shown(desk, "open") == "a"
    assert shown(desk, "open", "b", "next") == "d"
    assert shown(desk, "open", "d", "previous") == "b"
    assert shown(desk, "open", "e", "next") == "a"
    assert shown(desk, "all", "e", "next") is None
    assert shown(desk, "all", "c", "next") == "d"
    assert shown(desk, "open", "c") == "c", "named, so shown whatever its state"
    assert shown(desk, "kept") is None
    assert desk.show("open", "a")["upcoming"] == ["b", "d", "e"]


def test_a_person_overrules_the_rules(desk: Desk) -> None:
    assert record_of(desk, "c").dropped is not None
    assert decide(desk, "c", "keep").dropped is None


def test_undo_brings_back_each_former_decision_by_new_events(desk: Desk) -> None:
    history = [("keep", None), ("edit", "First."), ("drop", None), ("edit", "Second.")]
    before = []
    for decision, text in history:
        record = record_of(desk, "a")
        before.append((record.review, record.edited, record.text))
        decide(desk, "a", decision, text)
    for expected in reversed(before):
        record = undo(desk, "a")
        assert (record.review, record.edited, record.text) == expected
    assert len(written(desk)) > 2 * len(history), "a lost edit takes two events to bring back"
    with pytest.raises(ValueError, match="no decision to undo"):
        undo(desk, "a")


def test_undo_of_a_decision_from_an_earlier_day_opens_the_record(desk: Desk) -> None:
    desk.ledger.append(Reviewed(id="a", by="bob", decision="drop"))
    assert undo(desk, "a").review is None
    assert written(desk) == [("a", "drop", "bob"), ("a", None, "ada")]


def test_what_changed_since_it_was_seen_is_not_decided_on(desk: Desk) -> None:
    seen = version_of(record_of(desk, "a"))
    desk.decide("a", seen, "edit", "The other tab's work.")
    for decision in ("keep", "drop"):
        with pytest.raises(StaleError) as caught:
            desk.decide("a", seen, decision)
        assert caught.value.record.edited == "The other tab's work."
    with pytest.raises(StaleError):
        desk.undo("a", seen)
    assert written(desk) == [("a", "edit", "ada")]


def test_the_same_decision_sent_twice_is_written_once(desk: Desk) -> None:
    seen = version_of(record_of(desk, "a"))
    assert desk.decide("a", seen, "drop") == desk.decide("a", seen, "drop")
    assert written(desk) == [("a", "drop", "ada")]


def test_an_edit_without_a_change_keeps(desk: Desk) -> None:
    assert decide(desk, "a", "edit", " A a.\r\n").review == "keep"
    assert decide(desk, "b", "edit", "One.\r\nTwo.").text == "One.\nTwo."


@pytest.mark.parametrize(
    ("decision", "text", "message"),
    [
        ("edit", " \n", "empty"),
        ("edit", "x" * 20_001, "at most 20000"),
        ("edit", "half \ud83d", "surrogate"),
        ("edit", None, "belongs to 'edit'"),
        ("keep", "text", "belongs to 'edit'"),
        ("burn", None, "choose from keep, edit, drop"),
    ],
)
def test_a_decision_that_means_nothing_is_refused(
    desk: Desk, decision: str, text: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decide(desk, "a", decision, text)
    assert written(desk) == []


def test_unknown_records_states_and_steps_are_refused(desk: Desk) -> None:
    with pytest.raises(UnknownRecordError):
        desk.decide("z", "", "keep")
    with pytest.raises(UnknownRecordError):
        desk.show("all", "z")
    with pytest.raises(ValueError, match="choose from open"):
        desk.show("opened")
    with pytest.raises(ValueError, match="choose from here"):
        desk.show("open", "a", "sideways")


def test_a_write_that_fails_decides_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        decide(desk, "a", "keep")
    monkeypatch.undo()
    assert record_of(desk, "a").review is None
    assert decide(desk, "a", "keep").review == "keep"


@pytest.mark.parametrize(
    "image",
    [
        "ledger.jsonl",
        "images/../ledger.jsonl",
        "images/../secret.png",
        "secret.png",
        "images/link.png",
        "images/notes.txt",
        "images/absent.png",
        "images",
        "/etc/passwd",
    ],
)
def test_pictures_come_from_the_pictures_folder_only(tmp_path: Path, image: str) -> None:
    (tmp_path / "images").mkdir()
    for name in ("secret.png", "images/notes.txt", "images/fine.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(Generated(id="bad", by="m", image=image, text="t"))
    ledger.append(Generated(id="fine", by="m", image="images/fine.png", text="t"))
    desk = Desk(ledger, "ada")
    assert desk.picture("bad") is None
    assert desk.picture("fine") == (tmp_path / "images" / "fine.png").resolve()


@pytest.mark.parametrize("name", ["show", "decide"])
def test_thousands_of_records_answer_at_once(tmp_path: Path, name: str) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(
        *(Generated(id=f"{n:04}", by="m", image=f"images/{n}.png", text="t") for n in range(3500))
    )
    desk = Desk(ledger, "ada")
    if name == "decide":
        decide(desk, "1700", "drop")
    answer = desk.show("open", "1699", "next")
    assert answer["record"]["id"] == ("1701" if name == "decide" else "1700")
    assert len(json.dumps(answer)) < 2000, "one record travels, not all"


def test_differences_are_marked_word_by_word() -> None:
    old, new = mark_versions(["A big red dog . The dog", "A red cat."])
    assert "".join(piece.text for piece in old) == "A big red dog . The dog"
    assert new == [
        Piece("A red ", new=False, gone=False),
        Piece("cat", new=True, gone=False),
        Piece(".", new=False, gone=False),
    ]
    assert [piece.text for piece in old if piece.gone] == ["big", "dog", "The dog"]


def test_a_word_may_be_new_in_its_version_and_gone_from_the_next() -> None:
    middle = mark_versions(["one two", "one three", "one four"])[1]
    assert middle == [Piece("one ", new=False, gone=False), Piece("three", new=True, gone=True)]


def test_ideographs_are_words_of_their_own() -> None:
    marked = mark_versions(["一只红狗", "一只黑狗"])[1]
    assert [piece.text for piece in marked if piece.new] == ["黑"]


@pytest.mark.parametrize("text", ["", " ", "\n a\tb ", "x-y's 12.5%!!", "it’s e\u0301 🙂🙂"])
def test_marking_loses_no_character(text: str) -> None:
    for other in ("", "a x-y 12"):
        for version, pieces in zip((text, other), mark_versions([text, other]), strict=True):
            assert "".join(piece.text for piece in pieces) == version
