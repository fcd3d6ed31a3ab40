"""The review page's server as it runs: the real command, real HTTP requests."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentmodal.experiments.curation.ledger import Ledger
from latentmodal.experiments.curation.review_web import MAX_BODY_BYTES
from review_server import CLI, Server, make_ledger


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that write nothing."""
    server = Server(make_ledger(tmp_path_factory.mktemp("read")))
    yield server
    server.stop()


def test_without_the_word_everything_is_403(served: Server) -> None:
    for path in ("/", "/api/show", "/review.js", "/picture?id=a", served.path[:-2] + "/", "//"):
        status, answer, headers = served.ask(path)
        assert status == 403, path
        assert "address" in answer["error"]
        assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_the_page_needs_nothing_from_elsewhere(served: Server) -> None:
    status, page, headers = served.ask(served.path)
    assert status == 200
    files = re.findall(rb'(?:src|href)="([^"]+)"', page)
    assert files == [b"icon.svg", b"review.css", b"review.js"]
    for name in files:
        status, body, _ = served.ask(served.path + name.decode())
        assert status == 200
        assert not re.search(rb"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", body)
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer", "the address is the key"


@pytest.mark.parametrize(
    "path",
    [
        "images/a.png",
        "../ledger.jsonl",
        "..%2f..%2fledger.jsonl",
        "%2e%2e/ledger.jsonl",
        "review_page/../review.py",
        "picture?id=../ledger.jsonl",
        "picture?id=images/a.png",
        "picture?id=",
        "picture?id=%00",
    ],
)
def test_no_path_leads_out_of_the_pictures(served: Server, path: str) -> None:
    status, body, _ = served.ask(served.path + path)
    assert status == 404
    assert b"generated" not in json.dumps(body).encode()


def test_a_picture_is_served_as_what_it_is(served: Server) -> None:
    status, body, headers = served.ask(f"{served.path}picture?id=a")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert body == (served.ledger.parent / "images" / "a.png").read_bytes()
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Host": "evil.example:80"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_another_sites_page_cannot_decide(served: Server, headers: dict[str, str]) -> None:
    body = {**served.seen("a"), "decision": "drop"}
    assert served.post("api/decide", body, **headers)[0] == 403
    assert served.post("api/undo", body, **headers)[0] == 403
    assert served.decisions() == []


def test_a_name_that_foreign_dns_could_point_here_reads_nothing(served: Server) -> None:
    assert served.ask(f"{served.path}api/show", Host="rebound.example")[0] == 403
    port = served.host.partition(":")[2]
    for own in ("localhost:1", f"127.0.0.1:{port}", "[::1]:9000"):
        assert served.ask(f"{served.path}api/show", Host=own)[0] == 200, "also through a tunnel"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"x" * (MAX_BODY_BYTES + 1), {}, 413),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"{}", {"Content_Type": "application/x-www-form-urlencoded"}, 415),
        (b"{nonsense", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b"[]", {}, 400),
        (b'{"id": 1, "version": "", "decision": "keep"}', {}, 400),
        (b'{"id": "nobody", "version": "", "decision": "keep"}', {}, 404),
        (b'{"id": "a", "version": "old", "decision": "keep"}', {}, 409),
        (b'{"id": "a", "version": "", "decision": "burn"}', {}, 400),
    ],
)
def test_a_bad_body_is_refused(
    served: Server, body: bytes, headers: dict[str, str], status: int
) -> None:
    given = {"Content_Type": "application/json", **headers}
    assert served.ask(f"{served.path}api/decide", body, **given)[0] == status
    assert served.decisions() == []


def test_a_huge_body_without_a_length_is_cut_off(served: Server) -> None:
    host, _, port = served.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(
            f"POST {served.path}api/decide HTTP/1.1\r\nHost: {served.host}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(MAX_BODY_BYTES // 65536 + 1):
            client.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert b" 413 " in client.recv(4096)


def test_reading_does_not_decide(served: Server) -> None:
    status, _, _ = served.ask(f"{served.path}api/decide?id=a&decision=drop")
    assert status == 405


def test_a_decision_is_on_the_disk_when_it_is_answered(start_review: Callable[..., Server]) -> None:
    server = start_review()
    status, answer = server.post("api/decide", {**server.seen("a"), "decision": "drop"})
    assert (status, answer["record"]["state"]) == (200, "dropped")
    assert server.decisions() == [("a", "drop")]
    server.process.kill()
    server.process.communicate()
    assert Ledger(server.ledger).records()["a"].review == "drop"


def test_the_command_says_the_counts_at_its_end(start_review: Callable[..., Server]) -> None:
    server = start_review()
    server.post("api/decide", {**server.seen("a"), "decision": "keep"})
    last = server.stop().splitlines()[-1]
    assert last == "3 open, 1 kept, 0 edited, 0 dropped, 1 dropped by rules"
    assert server.process.returncode == 0


def test_what_cannot_be_served_is_one_line(
    start_review: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_review()
    free = make_ledger(tmp_path / "free")
    port = server.host.partition(":")[2]
    for arguments, message in (
        ([tmp_path / "absent"], "no such ledger"),
        ([server.ledger], "is being written by"),
        ([free, "--port", port], "--port 0 takes a free port"),
        ([free, "--by", " "], "--by"),
    ):
        done = subprocess.run(
            [*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
