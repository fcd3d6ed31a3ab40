"""The conversation's page as it runs: the real command and a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from browser import needs_browser, open_chromium

pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def address(tiny_runs: Path) -> Iterator[str]:
    """Where `latentmodal chat --web` listens, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "latentmodal.experiments.cli",
        "chat",
        str(tiny_runs / "talks"),
    ]
    process = subprocess.Popen(
        [*command, "--web", "--port", "0", "--max-new-tokens", "40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    yield found.group()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium("--window-size=1280,1000", logs=("browser", "performance")) as driver:
        yield driver


class Page:
    """The page, used as a person does."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get(address)
        self.until("#box textarea", 1)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements("css selector", selector))

    def until(self, selector: str, count: int) -> None:
        """Wait for so many of an element."""
        end = time.monotonic() + 30
        while (seen := self.count(selector)) != count:
            assert time.monotonic() < end, f"{seen} of {selector}, not {count}"
            time.sleep(0.05)

    def ask(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element("css selector", "#box textarea").send_keys(text, Keys.ENTER)

    def answers(self) -> list[str]:
        script = "return [...document.querySelectorAll('#talk .bot .md')].map(e => e.innerText)"
        return list(self.driver.execute_script(script))

    def answered(self, count: int, length: int = 40) -> list[str]:
        """The answers, once there are so many and the last is whole."""
        end = time.monotonic() + 30
        while len(said := self.answers()) != count or len(said[-1]) != length:
            assert time.monotonic() < end, said
            time.sleep(0.05)
        return said

    def upload(self, picture: Path) -> None:
        found = self.driver.find_element("css selector", "#box input[type=file]")
        found.send_keys(str(picture))
        self.until("#box .thumbnail-item", 1)

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    def hosts(self) -> set[str]:
        """Whom the browser asked since the last look."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = [urlsplit(event["params"]["request"]["url"]) for event in sent]
        return {url.netloc for url in urls if url.scheme not in ("data", "blob")}


@needs_browser
def test_a_person_talks_about_a_picture(chromium: Any, address: str, picture: Path) -> None:
    page = Page(chromium, address)
    assert chromium.title == "talks (seed 0): Latent Modal"
    page.upload(picture)
    page.ask("Is it <b>red</b>?")
    page.answered(1)
    assert page.count("#talk img") == 1
    assert page.count("#talk b") == 0, "shown, not obeyed"
    assert "<b>red</b>" in chromium.find_element("id", "talk").text
    page.ask("And now?")
    page.answered(2)

    page.click("undo")
    page.until("#talk .bot .md", 1)
    assert page.count("#talk img") == 1
    page.click("reset")
    page.until("#talk .bot .md", 0)
    assert page.count("#talk img") == 0
    assert page.hosts() == {urlsplit(address).netloc}, "nothing from elsewhere"
    assert [line for line in chromium.get_log("browser") if line["level"] == "SEVERE"] == []


@needs_browser
def test_an_answer_streams_and_can_be_stopped(chromium: Any, address: str) -> None:
    page = Page(chromium, address)
    number = chromium.find_element("css selector", "#max_new_tokens input[type=number]")
    chromium.execute_script(
        "arguments[0].value = 512; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
        "arguments[0].dispatchEvent(new Event('change', {bubbles: true}))",
        number,
    )
    page.ask("Tell me everything")
    lengths: list[int] = []
    end = time.monotonic() + 30
    while len(set(lengths)) < 3:
        assert time.monotonic() < end, lengths
        lengths += [len(text) for text in page.answers()]
    page.click("stop")
    before = -1
    while (length := len(page.answers()[0])) != before:
        before = length
        time.sleep(0.5)
    assert 0 < length < 512


@needs_browser
def test_each_tab_talks_by_itself(chromium: Any, address: str) -> None:
    first = Page(chromium, address)
    first.ask("Hello")
    first.answered(1)
    window = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    second = Page(chromium, address)
    assert second.answers() == []
    second.ask("Hello")
    second.answered(1)
    second.click("reset")
    second.until("#talk .bot .md", 0)
    chromium.close()
    chromium.switch_to.window(window)
    assert len(first.answers()) == 1


@needs_browser
def test_a_bad_picture_is_one_line_and_the_talk_goes_on(
    chromium: Any, address: str, tmp_path: Path
) -> None:
    page = Page(chromium, address)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.upload(tmp_path / "broken.png")
    page.ask("What is it?")
    page.until(".toast-body", 1)
    told = chromium.find_element("css selector", ".toast-body").get_attribute("textContent")
    assert "broken.png: cannot be read as a picture" in told
    assert "/gradio/" not in told
    assert page.answers() == []
    assert page.count("#box .thumbnail-item") == 1, "to be taken out by whoever put it in"
    page = Page(chromium, address)
    page.ask("Hello")
    page.answered(1)


def _request(address: str, path: str, body: bytes | None = None, **headers: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, named)
    status = connection.getresponse().status
    connection.close()
    return status


def test_only_this_machine_is_served(address: str) -> None:
    assert urlsplit(address).hostname == "127.0.0.1"
    assert _request(address, "/") == 200
    assert _request(address, "/", Host="rebound.example") == 400
    port = urlsplit(address).port
    with pytest.raises(OSError):
        http.client.HTTPConnection("127.0.0.2", port, timeout=5).connect()


def test_a_huge_upload_is_refused(address: str, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    for size, status in ((0, 200), (21 * 1024 * 1024, 413)):
        data = (tmp_path / "x.png").read_bytes() + b"\0" * size
        head = '--X\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n'
        body = head.encode() + data + b"\r\n--X--\r\n"
        kind = {"Content_Type": "multipart/form-data; boundary=X"}
        assert _request(address, "/gradio_api/upload", body, **kind) == status
