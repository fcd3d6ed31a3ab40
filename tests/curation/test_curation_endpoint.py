"""Refining through an endpoint, against a real server that behaves as badly as they do."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentmodal.experiments.curation.endpoint import (
    GIVE_UP_AFTER,
    EndpointConfig,
    EndpointRefiner,
    retry_after,
)
from latentmodal.experiments.curation.ledger import Ledger, Refused, Reviewed
from latentmodal.experiments.curation.refining import INSTRUCTION, refine_ledger
from latentmodal.experiments.errors import UserError

Make = Callable[..., Ledger]


def _config(**options: Any) -> EndpointConfig:
    fast = {"model": "m", "backoff": 0.01, "timeout": 5.0, "concurrency": 2}
    return EndpointConfig(**{**fast, **options})


def _mended(text: str) -> str:
    return text.replace("and and", "and")


def test_good_answers_are_recorded(chat_server: Any, described: Make, secret: str) -> None:
    chat_server.reply = lambda text, _nth: chat_server.ok(f'"{_mended(text)}"\n')
    ledger = described(5)
    progress = []
    tally = refine_ledger(
        ledger,
        _config().build(),
        on_progress=lambda tally, total: progress.append((tally.refined, total)),
    )
    assert (tally.refined, tally.refused) == (5, 0)
    assert progress == [(done, 5) for done in range(6)]
    for record in ledger:
        assert record.refined == _mended(record.generated)
        assert record.by == "m"
    request = chat_server.requests[0]
    assert request["model"] == "m"
    assert request["messages"][0] == {"role": "system", "content": INSTRUCTION}
    assert "temperature" not in request
    assert chat_server.keys == {f"Bearer {secret}"}
    assert refine_ledger(ledger, _config().build()).refined == 0
    assert sum(chat_server.asked.values()) == 5


@pytest.mark.parametrize(
    "failure",
    ["500", "502", "429", "429 date", "hang up", "time-out", "408"],
)
def test_passing_failures_are_tried_again(chat_server: Any, described: Make, failure: str) -> None:
    released = threading.Event()

    def reply(text: str, nth: int) -> Any:
        if nth > 2:
            return chat_server.ok(_mended(text))
        if failure == "hang up":
            return None
        if failure == "time-out":
            released.wait(0.6)
            return None
        headers = {}
        if failure == "429":
            headers = {"Retry-After": "0.05"}
        if failure == "429 date":
            headers = {"Retry-After": email.utils.formatdate(time.time() - 5, usegmt=True)}
        return chat_server.fail(int(failure[:3]), **headers)

    chat_server.reply = reply
    ledger = described(2)
    tally = refine_ledger(ledger, _config(timeout=0.3, temperature=0.0).build())
    assert all(request["temperature"] == 0 for request in chat_server.requests)
    released.set()
    assert (tally.refined, tally.refused) == (2, 0)
    assert set(chat_server.asked.values()) == {3}


def test_retry_after_holds_everybody(chat_server: Any, described: Make) -> None:
    def reply(text: str, nth: int) -> Any:
        if text.startswith("Number 0") and nth == 1:
            return chat_server.fail(429, **{"Retry-After": "1"})
        return chat_server.ok(_mended(text))

    chat_server.reply = reply
    assert refine_ledger(described(3), _config(concurrency=1).build()).refined == 3
    waited = chat_server.times[1] - chat_server.times[0]
    assert waited >= 0.95


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 12.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read(header: dict[str, str], seconds: float | None) -> None:
    assert retry_after(header, now=1445412468.0) == seconds


GARBAGE: dict[str, Callable[[Any, str], Any]] = {
    "the answer is not JSON": lambda _server, _text: (200, {}, b"<html>busy</html>"),
    "the answer has no choices": lambda _server, _text: (200, {}, b'{"choices": []}'),
    "the answer has no choices ": lambda _server, _text: (200, {}, b"[1, 2]"),
    "the answer has no choices  ": lambda _s, _t: (200, {}, b'{"choices": [{"message": null}]}'),
    "the answer has no choices   ": lambda _s, _t: (200, {"Content-Type": "text/html"}, b"<p>hi"),
    "the answer is no text": lambda server, _text: server.ok("", message={"content": [1]}),
    "the answer is no text ": lambda server, _text: server.ok("", message={"content": None}),
    "the answer is empty": lambda server, _text: server.ok(' "" '),
    "the answer was cut (length)": lambda server, text: server.ok(text, finish_reason="length"),
    "the model declined": lambda server, _text: server.ok("I'm sorry, I can't do that."),
    "the model declined ": lambda s, _t: s.ok("", message={"content": "", "refusal": "no"}),
    "the answer has 52 words": lambda server, text: server.ok(f"{text} " * 4),
    "7 of 7 different words": lambda server, _text: server.ok("My cat likes to eat fresh fish."),
    "the answer has characters": lambda server, text: server.ok(f"{text} ### ###"),
    "the answer says sentences again": lambda s, _t: s.ok("A brown dog sits. " * 2),
    "Error code: 400": lambda server, _text: server.fail(400, "content policy"),
}  # fmt: skip


@pytest.mark.parametrize("reason", GARBAGE)
def test_garbage_is_a_refusal_and_is_asked_again_next_time(
    chat_server: Any, described: Make, reason: str
) -> None:
    chat_server.reply = lambda text, nth: (
        GARBAGE[reason](chat_server, text) if nth == 1 else chat_server.ok(_mended(text))
    )
    ledger = described(1)
    tally = refine_ledger(ledger, _config().build())
    (record,) = ledger
    assert (tally.refined, tally.refused) == (0, 1)
    assert record.refused is not None
    assert record.refused.startswith(reason.strip())
    assert record.text == record.generated
    assert sum(chat_server.asked.values()) == 1  # garbage is no outage

    assert refine_ledger(ledger, _config().build()).refined == 1
    (record,) = ledger
    assert record.refused is None
    assert record.text == _mended(record.generated)


def test_an_endpoint_that_is_down_ends_the_run(chat_server: Any, described: Make) -> None:
    chat_server.reply = lambda _text, _nth: chat_server.fail(503, "overloaded")
    ledger = described(20)
    with pytest.raises(UserError, match=r"answered none of the last [56] texts \(.*overloaded"):
        refine_ledger(ledger, _config(attempts=2).build())
    refused = [record for record in ledger if record.refused]
    assert GIVE_UP_AFTER <= len(refused) <= GIVE_UP_AFTER + 1
    assert all("(2 attempts)" in str(record.refused) for record in refused)
    chat_server.reply = lambda text, _nth: chat_server.ok(_mended(text))
    assert refine_ledger(ledger, _config().build()).refined == 20


def test_a_server_that_asks_for_an_hour_is_down(chat_server: Any, described: Make) -> None:
    chat_server.reply = lambda _t, _n: chat_server.fail(429, "quota", **{"Retry-After": "3600"})
    ledger = described(1)
    assert refine_ledger(ledger, _config().build()).refused == 1
    assert "come back in 3600 s" in str(next(iter(ledger)).refused)
    assert sum(chat_server.asked.values()) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_text_would_mend_ends_the_run_at_once(
    chat_server: Any, described: Make, status: int, secret: str
) -> None:
    chat_server.reply = lambda _text, _nth: chat_server.fail(status, f"bad key {secret}!")
    ledger = described(10)
    with pytest.raises(UserError, match=f"refuses: .*{status}.*bad key") as caught:
        refine_ledger(ledger, _config().build())
    assert sum(chat_server.asked.values()) <= 2
    assert not any(record.refused for record in ledger)
    assert secret not in str(caught.value)
    assert caught.value.__suppress_context__  # no traceback shows the original


def test_the_pace_and_the_number_at_a_time_are_kept(chat_server: Any, described: Make) -> None:
    def reply(text: str, _nth: int) -> Any:
        time.sleep(0.15)
        return chat_server.ok(_mended(text))

    chat_server.reply = reply
    config = _config(requests_per_minute=60 / 0.1, concurrency=2)
    assert refine_ledger(described(6), config.build()).refined == 6
    gaps = [b - a for a, b in zip(chat_server.times, chat_server.times[1:], strict=False)]
    assert sum(gaps) >= 0.45
    assert chat_server.most_at_once == 2


def test_the_key_is_nowhere(
    chat_server: Any,
    described: Make,
    secret: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    # A server that quotes what it was sent, in every kind of answer.
    chat_server.reply = lambda text, nth: {
        1: chat_server.fail(500, f"key {secret}"),
        2: chat_server.fail(400, f"your key is {secret}"),
    }.get(nth, chat_server.ok(_mended(text)))
    ledger = described(2)
    refiner = _config().build()
    refine_ledger(ledger, refiner)
    assert all("your key is [key]" in str(record.refused) for record in ledger)
    assert secret not in repr(refiner) + repr(refiner.config) + caplog.text
    assert any("attempt 1" in line for line in caplog.messages)
    assert secret not in ledger.path.read_text()
    assert secret not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "OPENAI_API_KEY is not set"),
        ({"OPENAI_BASE_URL": "localhost:8000"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_BASE_URL": "http://host:port/"}, "OPENAI_BASE_URL is no address"),
        ({"OPENAI_API_KEY": "secret\x07key"}, "OPENAI_API_KEY holds characters"),
    ],
)
def test_a_bad_environment_is_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        EndpointRefiner(_config(), environment)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0}, {"requests_per_minute": 0}]
)
def test_bad_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        _config(**options)


def test_a_person_s_word_stands(chat_server: Any, described: Make) -> None:
    ledger = described(3)
    ledger.append(
        Reviewed(id="p0", by="anna", decision="edit", text="A dog."),
        Refused(id="p1", by="m", reason="earlier"),
    )
    ledger.close()
    assert refine_ledger(ledger, _config().build(), limit=1).refined == 1
    assert [record.refined is not None for record in ledger] == [False, True, False]


def test_killed_in_the_middle_then_resumed(
    chat_server: Any, described: Make, tmp_path: Path, latentmodal: Any
) -> None:
    """Nothing recorded is lost or asked for twice; at most what was under way is asked again."""
    ledger = described(40)

    def reply(text: str, _nth: int) -> Any:
        time.sleep(0.03)
        return chat_server.ok(_mended(text))

    chat_server.reply = reply
    command = ["curate", "refine", str(ledger.folder), "--endpoint", "m", "--concurrency", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "latentmodal.experiments.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while sum(record.refined is not None for record in ledger) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # the server ends what it was at
    recorded = {record.generated for record in ledger if record.refined is not None}
    asked = dict(chat_server.asked)
    assert 8 <= len(recorded) < 40
    assert set(asked.values()) == {1}
    assert len(asked) - len(recorded) <= 3

    # The line being written when the process died, at worst:
    with ledger.path.open("ab") as file:
        file.write(b'{"id": "p39", "event": "refi')
    done = latentmodal(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{40 - len(recorded)} refined, 0 refused, 40 in")
    assert all(record.refined == _mended(record.generated) for record in ledger)
    assert all(chat_server.asked[text] == 1 for text in recorded)
    assert sum(chat_server.asked.values()) <= 40 + 3
    events = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert sum(event["event"] == "refined" for event in events) == 40
