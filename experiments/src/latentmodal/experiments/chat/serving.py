"""Serving the conversation's page."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import sys
from contextlib import suppress
from typing import Any, Final

from latentmodal.experiments.chat.opening import Speaker
from latentmodal.experiments.errors import UserError
from latentmodal.experiments.local_server import address, is_loopback, listen, run_server
from latentmodal.llm import GenerationSettings

logger = logging.getLogger(__name__)

MAX_UPLOAD_BYTES: Final = 20 * 1024 * 1024

# Everything comes from this server; the page's framework writes scripts and styles into its HTML
# and compiles some of them, so that these cannot be refused.
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; base-uri 'self'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def check_installed() -> None:
    """Say so before a model is loaded for nothing.

    Raises:
        UserError: the page's packages are not installed.
    """
    # Read when it is imported: nothing is told to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise UserError(f"--web needs {error.name}: pip install gradio") from error


def serve_chat(
    speaker: Speaker, settings: GenerationSettings, *, host: str = "127.0.0.1", port: int = 8360
) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UserError: the packages are not installed, or the address cannot be listened at.
    """
    check_installed()
    with listen(host, port) as listener:
        url = address(host, listener)
        if not is_loopback(host):
            logger.warning(
                "--host %s: whoever reaches this machine can talk with the model; the connection "
                "is not encrypted",
                host,
            )
        app = chat_app(speaker, settings, {host.lower()})
        sys.stdout.write(f"{speaker.name}: {url}\nCtrl+C ends\n")
        sys.stdout.flush()
        run_server(app, listener, lifespan=True)


def chat_app(speaker: Speaker, settings: GenerationSettings, host_names: set[str]) -> Any:
    """The page as an ASGI application; requests must name a host of this machine.

    A name that foreign DNS points here would let another site's page read the answers.
    """
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from latentmodal.experiments.chat.page import STYLE, build_page, theme

    app = FastAPI(openapi_url=None)
    names = {"localhost", "127.0.0.1", "[::1]", socket.gethostname().lower(), *host_names}
    served = gradio.mount_gradio_app(
        app,
        build_page(speaker, settings),
        path="/",
        footer_links=[],
        show_error=True,
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=STYLE,
    )
    served.add_middleware(TrustedHostMiddleware, allowed_hosts=sorted(names))
    return _with_headers(served)


def _with_headers(app: Any) -> Any:
    """The application, its answers under the policy above; they are not buffered."""
    extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        # At the end of the server, tabs still listening are cancelled; that is no error.
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send_with_headers)

    return serve
