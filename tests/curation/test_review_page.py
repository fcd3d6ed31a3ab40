"""The review page as it runs: the real command, real HTTP requests, a real browser."""

from __future__ import annotations

import http.client
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from latentmodal.experiments.curation.ledger import Filtered, Generated, Ledger, Refined
from latentmodal.experiments.curation.review_web import MAX_BODY_BYTES

CLI = [sys.executable, "-m", "latentmodal.experiments.cli", "curate", "review"]
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="chromium and chromedriver are not on the PATH"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that write nothing."""
    server = Server(make_ledger(tmp_path_factory.mktemp("read")))
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers on ledgers of their own."""
    servers: list[Server] = []

    def begin(names: str = "abcde") -> Server:
        servers.append(Server(make_ledger(tmp_path / str(len(servers)), names)))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.stop()


# Requests


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


def test_a_decision_is_on_the_disk_when_it_is_answered(start: Callable[..., Server]) -> None:
    server = start()
    status, answer = server.post("api/decide", {**server.seen("a"), "decision": "drop"})
    assert (status, answer["record"]["state"]) == (200, "dropped")
    assert server.decisions() == [("a", "drop")]
    server.process.kill()
    server.process.communicate()
    assert Ledger(server.ledger).records()["a"].review == "drop"


def test_the_command_says_the_counts_at_its_end(start: Callable[..., Server]) -> None:
    server = start()
    server.post("api/decide", {**server.seen("a"), "decision": "keep"})
    last = server.stop().splitlines()[-1]
    assert last == "3 open, 1 kept, 0 edited, 0 dropped, 1 dropped by rules"
    assert server.process.returncode == 0


def test_what_cannot_be_served_is_one_line(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
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


# The browser


class Page:
    """The page in a headless Chromium, used as a person does: keys and what is to be seen."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        self.driver.get(url)
        self.wait()

    def wait(self) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        ready = (
            "return document.getElementById('main').getAttribute('aria-busy') === 'false'"
            " && document.getElementById('picture').complete"
        )
        WebDriverWait(self.driver, 20).until(lambda driver: driver.execute_script(ready))

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)
        self.wait()

    def text(self, name: str) -> str:
        return str(self.driver.find_element("id", name).text)

    def visible(self, name: str) -> bool:
        return bool(self.driver.find_element("id", name).is_displayed())

    def pieces(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements("css selector", selector)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@needs_browser
def test_a_person_reviews_by_keyboard(chromium: Any, start: Callable[..., Server]) -> None:
    from selenium.webdriver.common.keys import Keys

    server = start()
    page = Page(chromium, server.url)
    assert page.text("name") == "a"
    assert page.visible("picture")
    assert page.pieces(".version.refined ins") == ["fine"]
    assert "<b>bold</b>" in "".join(page.pieces(".version.generated")), "shown, not obeyed"
    assert "bold" in " ".join(page.pieces(".version.generated del"))

    page.press("k")
    assert page.text("name") == "b"
    assert server.decisions() == [("a", "keep")]

    page.press("e")
    page.press(Keys.CONTROL, Keys.END)
    page.press(Keys.NULL, " kd By hand.")
    page.press(Keys.ESCAPE)
    assert not page.visible("editor")
    page.press("e")
    assert page.text("draft") == "your unsaved draft"
    page.press(Keys.CONTROL, Keys.ENTER)
    assert Ledger(server.ledger).records()["b"].text == "A fine b. kd By hand."
    assert page.text("name") == "d", "c is dropped by rules"

    page.press("d")
    page.press("u")
    assert page.text("name") == "d"
    assert page.text("state") == "open"
    page.press("u")
    assert (page.text("name"), page.text("state")) == ("b", "open")
    taken_back = [("d", None), ("b", None)]
    assert server.decisions() == [("a", "keep"), ("b", "edit"), ("d", "drop"), *taken_back]
    page.press(Keys.ARROW_LEFT)
    assert (page.text("name"), page.text("state")) == ("a", "kept by ada")
    page.press(Keys.ARROW_RIGHT)
    assert page.text("name") == "b"

    page.press("/")
    for _ in range(4):
        page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ENTER)
    assert page.text("name") == "c"
    assert page.text("notes") == "Dropped by the rules: too_short: 3"
    page.press("k")
    assert Ledger(server.ledger).records()["c"].dropped is None
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
def test_the_page_says_what_was_not_saved(chromium: Any, start: Callable[..., Server]) -> None:
    server = start()
    page = Page(chromium, server.url)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    full = (server.ledger.stat().st_size, limits[1])
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, full)
    page.press("k")
    assert page.text("problem").startswith("Not saved.")
    assert "could not be written" in page.text("problem")
    assert (page.text("name"), page.text("state")) == ("a", "open")
    assert server.decisions() == []

    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    page.press("k")
    assert not page.visible("problem")
    assert server.decisions() == [("a", "keep")]

    server.stop()
    page.press("k")
    assert "does not answer" in page.text("problem")


@needs_browser
def test_two_tabs_do_not_overwrite_each_other(chromium: Any, start: Callable[..., Server]) -> None:
    server = start()
    page = Page(chromium, server.url)
    server.post("api/decide", {**server.seen("a"), "decision": "edit", "text": "Other tab."})
    page.press("d")
    assert "meanwhile this is edited by ada" in page.text("problem")
    assert page.pieces(".version.edited p") == ["Other tab."]
    assert server.decisions() == [("a", "edit")]
    page.press("d")
    assert server.decisions() == [("a", "edit"), ("a", "drop")]
    assert page.text("name") == "b"


@needs_browser
def test_a_key_held_down_decides_once(chromium: Any, start: Callable[..., Server]) -> None:
    server = start()
    page = Page(chromium, server.url)
    press = (
        "document.body.dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'k', repeat: arguments[0], bubbles: true}))"
    )
    for repeat, decisions in ((True, []), (False, [("a", "keep")])):
        chromium.execute_script(press, repeat)
        page.wait()
        assert server.decisions() == decisions


@needs_browser
def test_keep_all_reviews_a_ledger_to_its_end(tmp_path: Path) -> None:
    pytest.importorskip("selenium", reason="selenium is not installed")
    ledger = make_ledger(tmp_path / "chain", "abcdefg")
    tool = Path(__file__).parents[2] / "tools" / "keep_all.py"
    done = subprocess.run(
        [sys.executable, str(tool), str(ledger)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "0 open, 6 kept, 0 edited, 0 dropped, 1 dropped by rules" in done.stdout
    reviewers = {record.reviewed_by for record in Ledger(ledger) if record.id != "c"}
    assert reviewers == {"scripted browser"}
