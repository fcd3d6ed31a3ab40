"""The ledger: events fold, nothing acknowledged is lost, one writer at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentmodal.experiments.curation.ledger import (
    Event,
    Filtered,
    Generated,
    Ledger,
    Record,
    Refined,
    Refused,
    Reviewed,
    existing_ledger,
)
from latentmodal.experiments.errors import UserError


def _generated(name: str, text: str = "A cat.") -> Generated:
    return Generated(id=name, by="model", image=f"images/{name}.png", text=text, instruction="say")


def _record(ledger: Ledger, name: str) -> Record:
    return ledger.records()[name]


def test_events_fold_in_order_and_are_stamped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(_generated("b"), _generated("a"))
    ledger.append(Refused(id="b", by="llm", reason="429"))
    assert _record(ledger, "b").refused == "429"
    ledger.append(Refined(id="b", by="llm", text="One cat."))
    ledger.close()

    again = Ledger(tmp_path / "ledger.jsonl")
    assert [record.id for record in again] == ["b", "a"]
    record = _record(again, "b")
    assert (record.text, record.generated, record.refused) == ("One cat.", "A cat.", None)
    assert (record.by, record.instruction, record.image) == ("llm", "say", "images/b.png")
    lines = [json.loads(line) for line in again.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["generated", "generated", "refused", "refined"]
    assert all(line["time"].endswith("+00:00") and line["by"] for line in lines)


@pytest.mark.parametrize(
    ("events", "text", "dropped", "kept", "kept_unreviewed"),
    [
        ((), "generated", None, False, True),
        ((Filtered(id="a", by="r", reason="too_short"),), "generated", "too_short", False, False),
        (
            (
                Filtered(id="a", by="r", reason="too_short"),
                Filtered(id="a", by="r", reason=None),
            ),
            "generated",
            None,
            False,
            True,
        ),
        (
            (Filtered(id="a", by="r", reason="x"), Refined(id="a", by="m", text="refined")),
            "refined",
            None,
            False,
            True,
        ),
        (
            (Filtered(id="a", by="r", reason="x"), Reviewed(id="a", by="p", decision="keep")),
            "generated",
            None,
            True,
            True,
        ),
        (
            (
                Reviewed(id="a", by="p", decision="edit", text="edited"),
                Refined(id="a", by="m", text="refined"),
                Reviewed(id="a", by="p", decision="keep"),
            ),
            "edited",
            None,
            True,
            True,
        ),
        ((Reviewed(id="a", by="p", decision="drop"),), "generated", None, False, False),
        (
            (
                Filtered(id="a", by="r", reason="x"),
                Reviewed(id="a", by="p", decision="edit", text="edited"),
                Reviewed(id="a", by="p", decision=None),
            ),
            "generated",
            "x",
            False,
            False,
        ),
    ],
)
def test_the_last_word_counts(
    tmp_path: Path,
    events: tuple[Event, ...],
    text: str,
    dropped: str | None,
    kept: bool,
    kept_unreviewed: bool,
) -> None:
    ledger = Ledger(tmp_path / "l.jsonl")
    ledger.append(_generated("a", "generated"), *events)
    ledger.close()
    record = _record(Ledger(tmp_path / "l.jsonl"), "a")
    assert (record.text, record.dropped) == (text, dropped)
    assert record.kept(unreviewed=False) is kept
    assert record.kept(unreviewed=True) is kept_unreviewed


@pytest.mark.parametrize("torn", [b'{"id": "c", "ev', b'{"id":"c","event":"refused"}', b"\0\0\0"])
def test_a_torn_last_line_is_ignored_then_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.append(_generated("a"))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)

    reader = Ledger(path)
    assert list(reader.records()) == ["a"]
    assert path.read_bytes() == whole + torn  # reading mends nothing
    reader.append(_generated("b"))
    assert path.read_bytes().startswith(whole + b'{"id": "b"')
    reader.close()
    assert list(Ledger(path).records()) == ["a", "b"]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.append(_generated("a"))
    path.write_bytes(path.read_bytes() + b"garbage\n")
    with pytest.raises(UserError, match=r"ledger\.jsonl, line 2: is no event"):
        Ledger(path).records()


def test_nothing_is_written_of_a_bad_call(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(_generated("a"))
    with pytest.raises(ValueError, match="'b' is refined, but was never generated"):
        ledger.append(_generated("c"), Refined(id="b", by="m", text="t"))
    ledger.close()
    assert list(Ledger(ledger.path).records()) == ["a"] == list(ledger.records())


@pytest.mark.parametrize(("decision", "text"), [("edit", None), ("keep", "text"), ("later", None)])
def test_a_bad_review_is_refused(decision: str, text: str | None) -> None:
    with pytest.raises(ValueError, match=f"decision '{decision}'"):
        Reviewed(id="a", by="p", decision=decision, text=text)  # type: ignore[arg-type]


def test_halves_of_surrogate_pairs_do_not_stop_it(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.jsonl") as ledger:
        ledger.append(_generated("a", "cat \ud83d and line\u2028end\r."))
    assert _record(Ledger(tmp_path / "l.jsonl"), "a").text == "cat ? and line\u2028end\r."


def test_one_writer_many_readers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first, second = Ledger(path), Ledger(path)
    first.append(_generated("a"))
    assert list(second.records()) == ["a"]
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on"):
        second.append(_generated("b"))
    first.append(_generated("c"))
    first.close()
    second.append(_generated("b"))
    assert list(second.records()) == ["a", "c", "b"] == list(first.records())


WRITER = """
import sys
from pathlib import Path
from latentmodal.experiments.curation.ledger import Generated, Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(100_000):
    ledger.append(Generated(id=str(number), by="m", image="i", text="x" * 2000))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    acknowledged = [int(writer.stdout.readline()) for _ in range(30)]
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().splitlines() if line.isdigit()]
    writer.wait()
    with Ledger(path) as ledger:  # the lock went with the process
        assert {str(number) for number in acknowledged} <= set(ledger.records())


def test_a_missing_ledger_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such ledger"):
        existing_ledger(tmp_path)
    with Ledger(tmp_path / "ledger.jsonl"):
        pass
    assert existing_ledger(tmp_path).path == tmp_path / "ledger.jsonl"
    assert len(existing_ledger(tmp_path / "ledger.jsonl")) == 0
