"""The review page's server, as the real command starts it, and a ledger for it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from latentmodal.experiments.curation.ledger import Filtered, Generated, Ledger, Refined

CLI = [sys.executable, "-m", "latentmodal.experiments.cli", "curate", "review"]


def make_ledger(folder: Path, names: str = "abcde") -> Path:
    """One picture and a refined text for each name; the rules dropped `c`."""
    (folder / "images").mkdir(parents=True)
    with Ledger(folder / "ledger.jsonl") as ledger:
        for name in names:
            Image.new("RGB", (24, 16), (ord(name), 90, 90)).save(folder / "images" / f"{name}.png")
            said = f"A <b>bold</b> {name} and a {name}."
            ledger.append(
                Generated(id=name, by="model", image=f"images/{name}.png", text=said),
                Refined(id=name, by="refiner", text=f"A fine {name}."),
                Filtered(id=name, by="rules", reason="too_short: 3" if name == "c" else None),
            )
    return folder / "ledger.jsonl"


class Server:
    """`latentmodal curate review` in a process of its own."""

    def __init__(self, ledger: Path, *options: str) -> None:
        self.ledger = ledger
        command = [*CLI, str(ledger), "--by", "ada", "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        address = re.search(r"http://\S+", self.process.stdout.readline())
        assert address is not None
        self.url = address.group()
        parts = urlsplit(self.url)
        self.host, self.path = parts.netloc, parts.path

    def ask(
        self, path: str, body: bytes | None = None, method: str = "", **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, body (as JSON where it is) and headers; the path goes out as it stands."""
        connection = http.client.HTTPConnection(self.host, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, named)
        response = connection.getresponse()
        data = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(data) if is_json else data, response.headers

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        kind = {"Content_Type": "application/json", "Origin": f"http://{self.host}"}
        status, answer, _ = self.ask(
            self.path + path, json.dumps(body).encode(), **{**kind, **headers}
        )
        return status, answer

    def seen(self, name: str) -> dict[str, str]:
        _, answer, _ = self.ask(f"{self.path}api/show?id={name}")
        return {"id": name, "version": answer["record"]["version"]}

    def decisions(self) -> list[tuple[str, str | None]]:
        events = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        assert all(e["by"] == "ada" for e in events if e["event"] == "reviewed")
        return [(e["id"], e["decision"]) for e in events if e["event"] == "reviewed"]

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=20)
        assert "Traceback" not in err, err
        return out
