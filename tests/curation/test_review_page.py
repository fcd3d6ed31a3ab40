"""The review page as a person uses it: the real command and a real browser."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import needs_browser, open_chromium
from latentmodal.experiments.curation.ledger import Ledger
from review_server import Server, make_ledger


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
    with open_chromium() as driver:
        yield driver


@needs_browser
def test_a_person_reviews_by_keyboard(chromium: Any, start_review: Callable[..., Server]) -> None:
    from selenium.webdriver.common.keys import Keys

    server = start_review()
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
def test_the_page_says_what_was_not_saved(
    chromium: Any, start_review: Callable[..., Server]
) -> None:
    server = start_review()
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
def test_two_tabs_do_not_overwrite_each_other(
    chromium: Any, start_review: Callable[..., Server]
) -> None:
    server = start_review()
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
def test_a_key_held_down_decides_once(chromium: Any, start_review: Callable[..., Server]) -> None:
    server = start_review()
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
