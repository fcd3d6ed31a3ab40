"""Keeps every open description of a ledger, as a person would: on the review page, by the key `k`.

    python tools/keep_all.py LEDGER [--by NAME]

It stands in for the person where a chain must run alone. It needs `selenium` and Chromium with
its driver (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

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
SECONDS = 30  # for one picture, on a busy machine
PLACE = """
    const at = (id) => document.getElementById(id);
    if (at("main").getAttribute("aria-busy") === "true") return null;
    if (!at("summary").hidden) return "end";
    return at("picture").complete ? at("place").textContent : null;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--by", default="scripted browser", help="the name in each decision")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "latentmodal.experiments.cli", "curate", "review"]
    command += [str(arguments.ledger), "--by", arguments.by, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            address = re.search(r"http://\S+", server.stdout.readline())
            if address is None:
                sys.exit(2)  # the server has said why
            keep_all(address.group())
        finally:
            server.send_signal(signal.SIGINT)
        sys.stdout.write(server.stdout.read())


def keep_all(url: str) -> None:
    """Press `k` until the page says that everything is reviewed.

    Raises:
        RuntimeError: Chromium or its driver is absent, or the page reports a problem.
    """
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise RuntimeError("chromium and chromedriver must be on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        page.get(url)
        place = _next(page, "")
        while place != "end":
            page.find_element(By.TAG_NAME, "body").send_keys("k")
            place = _next(page, place)
    finally:
        page.quit()


def _next(page: webdriver.Chrome, before: str) -> str:
    """Wait for a record other than the one `before`; "end" where none is left."""

    def ready(_: object) -> str | None:
        problem = page.find_element(By.ID, "problem").text
        if problem:
            raise RuntimeError(problem)
        place: str | None = page.execute_script(PLACE)
        return None if place == before else place

    place = WebDriverWait(page, SECONDS).until(ready)
    assert place is not None
    return place


if __name__ == "__main__":
    main()
