"""Serving a page from this machine, to this machine unless told otherwise."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Any, Final

from latentmodal.experiments.errors import UserError

_GRACE_SECONDS: Final = 2  # for answers under way at the end


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        UserError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "ports go up to 65535"
        raise UserError(
            f"cannot listen at {host} port {port} ({reason}); --port 0 takes a free port"
        ) from error


def address(host: str, listener: socket.socket) -> str:
    """Where a browser finds the server, with a slash at the end."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    bracketed = f"[{name}]" if ":" in name else name
    return f"http://{bracketed}:{listener.getsockname()[1]}/"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def run_server(app: Any, listener: socket.socket, *, lifespan: bool = False) -> None:
    """Serve an ASGI application until the process is interrupted.

    Args:
        app: the application.
        listener: where it is reached.
        lifespan: whether it is told of its start and end.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on" if lifespan else "off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
