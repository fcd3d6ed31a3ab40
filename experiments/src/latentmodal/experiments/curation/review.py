"""A local page on which a person keeps, edits or drops descriptions, one picture at a time."""

from __future__ import annotations

import getpass
import logging
import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentmodal.experiments.curation.ledger import existing_ledger
from latentmodal.experiments.curation.review_desk import STATES, Desk
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.local_server import address, is_loopback, listen, run_server

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

_IN_WORDS: Final = {
    "open": "open",
    "kept": "kept",
    "edited": "edited",
    "dropped": "dropped",
    "rule": "dropped by rules",
}


def serve_review(
    path: Path,
    *,
    by: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8350,
    open_browser: bool = False,
    say: Callable[[str], object],
) -> None:
    """Serve the review page of a ledger until it is interrupted.

    Args:
        path: the ledger, or its folder.
        by: the reviewer's name, written into each decision; None means the login name.
        host, port: where to listen; port 0 takes a free one.
        open_browser: whether to open the page in this machine's browser.
        say: shows the user a line: the address at first, the counts at last.

    Raises:
        UserError: no such ledger, an empty one, one that another process writes, an address that
            cannot be listened at, or a package is missing.
    """
    try:
        from latentmodal.experiments.curation.review_web import review_app
    except ModuleNotFoundError as error:
        raise UserError(f"review needs {error.name}: pip install starlette uvicorn") from error
    name = (_login_name() if by is None else by).strip()
    if not name:
        raise UserError("--by '': give the reviewer's name")
    with existing_ledger(path) as ledger, listen(host, port) as listener:
        if not len(ledger):
            raise UserError(f"{ledger.path}: holds no descriptions; generate some first")
        desk = Desk(ledger, name)
        token = secrets.token_urlsafe(24)
        machine = socket.gethostname()
        url = f"{address(host, listener)}{token}/"
        if not is_loopback(host):
            logger.warning(
                "--host %s: whoever reaches this machine and learns the address can see the "
                "pictures and decide; the connection is not encrypted",
                host,
            )
        say(f"review as {name}: {url}\nevery decision is saved at once; Ctrl+C ends")
        if open_browser:
            webbrowser.open(url)
        run_server(review_app(desk, token, {"localhost", host.lower(), machine.lower()}), listener)
        counts = desk.show()["counts"]
        say(", ".join(f"{counts[state]} {_IN_WORDS[state]}" for state in STATES))


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a user id without a name, as in some containers
        raise UserError("--by: this login has no name; give the reviewer's name") from error
