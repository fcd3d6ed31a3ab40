"""A local page on which a person keeps, edits or drops descriptions, one picture at a time."""

from __future__ import annotations

import getpass
import ipaddress
import logging
import secrets
import socket
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latentmodal.experiments.curation.ledger import existing_ledger
from latentmodal.experiments.curation.review_desk import STATES, Desk
from latentmodal.experiments.errors import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)

_IN_WORDS: Final = {
    "open": "open",
    "kept": "kept",
    "edited": "edited",
    "dropped": "dropped",
    "rule": "dropped by rules",
}
_GRACE_SECONDS: Final = 2  # for answers under way at the end; their decisions are on disk anyway


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
        raise UserError(
            f"review needs {error.name}: pip install 'latentmodal[curation]'"
        ) from error
    name = (_login_name() if by is None else by).strip()
    if not name:
        raise UserError("--by '': give the reviewer's name")
    with existing_ledger(path) as ledger, _listen(host, port) as listener:
        if not len(ledger):
            raise UserError(f"{ledger.path}: holds no descriptions; generate some first")
        desk = Desk(ledger, name)
        token = secrets.token_urlsafe(24)
        machine = socket.gethostname()
        url = _url(machine if host in ("0.0.0.0", "::") else host, listener, token)
        if not _is_loopback(host):
            logger.warning(
                "--host %s: whoever reaches this machine and learns the address can see the "
                "pictures and decide; the connection is not encrypted",
                host,
            )
        say(f"review as {name}: {url}\nevery decision is saved at once; Ctrl+C ends")
        if open_browser:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):
            _run(review_app(desk, token, {"localhost", host.lower(), machine.lower()}), listener)
        counts = desk.show()["counts"]
        say(", ".join(f"{counts[state]} {_IN_WORDS[state]}" for state in STATES))


def _run(app: ASGIApp, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise UserError(
            f"cannot listen at {host} port {port} ({reason}); --port 0 takes a free port"
        ) from error


def _url(name: str, listener: socket.socket, token: str) -> str:
    host = f"[{name}]" if ":" in name else name
    return f"http://{host}:{listener.getsockname()[1]}/{token}/"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # a user id without a name, as in some containers
        raise UserError("--by: this login has no name; give the reviewer's name") from error
