"""What several tests of the curation need."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from latentmodal.experiments.curation.ledger import Generated, Ledger
from review_server import Server, make_ledger

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""
KEY = "sk-very-secret-0123456789"


@dataclass
class ChatServer:
    """A chat endpoint; `reply(text, nth)` answers the nth request (from 1) for a text."""

    address: str
    reply: Callable[[str, int], Reply | None]
    asked: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    at_once: int = 0
    most_at_once: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def ok(text: str, **choice: Any) -> Reply:
        """An answer as OpenAI gives it."""
        message = {"role": "assistant", "content": text}
        whole = {"index": 0, "finish_reason": "stop", "message": message, **choice}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return 200, {}, json.dumps({**body, "choices": [whole]}).encode()

    @staticmethod
    def fail(status: int, message: str = "no", **headers: str) -> Reply:
        """An error as OpenAI gives it."""
        return status, headers, json.dumps({"error": {"message": message}}).encode()


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """A real HTTP server, which the environment points to; a reply of None hangs up."""
    server = ChatServer("", lambda text, _nth: ChatServer.ok(text))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = request["messages"][-1]["content"]
            with server.guard:
                server.asked[text] += 1
                server.times.append(time.monotonic())
                server.requests.append(request)
                server.keys.add(self.headers.get("Authorization", ""))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
                nth = server.asked[text]
            try:
                self._answer(server.reply(text, nth))
            finally:
                with server.guard:
                    server.at_once -= 1

        def _answer(self, reply: Reply | None) -> None:
            if reply is None:
                self.close_connection = True
                return
            status, headers, body = reply
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            # A client that ran out of patience is part of the tests.
            try:
                super().handle()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{http.server_address[1]}/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", server.address)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def secret() -> str:
    """The key the environment holds while `chat_server` runs."""
    return KEY


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Ledger]:
    """Makes a ledger of so many generated descriptions, none alike."""

    def make(count: int = 3) -> Ledger:
        ledger = Ledger(tmp_path / "curated" / "ledger.jsonl")
        with ledger:
            for number in range(count):
                text = f"Number {number} is a brown dog on a sofa and and it sits."
                ledger.append(
                    Generated(
                        id=f"p{number}", by="stage 1", image=f"images/p{number}.png", text=text
                    )
                )
        return ledger

    return make


@pytest.fixture
def start_review(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers on ledgers of their own."""
    servers: list[Server] = []

    def begin(names: str = "abcde") -> Server:
        servers.append(Server(make_ledger(tmp_path / str(len(servers)), names)))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.stop()
