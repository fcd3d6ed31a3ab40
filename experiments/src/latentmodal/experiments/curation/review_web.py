"""The review page's web application.

The address holds a word drawn at each start, without which every answer is 403. Against pages of
other sites in the same browser, requests must also name a host that foreign DNS cannot point here,
and decisions must come from this page's own origin and as JSON.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentmodal.experiments.curation.review_desk import (
    MEDIA_TYPES,
    Desk,
    StaleError,
    UnknownRecordError,
)
from latentmodal.experiments.errors import UserError

MAX_BODY_BYTES: Final = 256 * 1024

_PAGE: Final = Path(__file__).with_name("review_page")
_PAGE_FILES: Final = {
    "": ("index.html", "text/html"),
    "review.js": ("review.js", "text/javascript"),
    "review.css": ("review.css", "text/css"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_Endpoint = Callable[[Request], Awaitable[Response]]


def review_app(desk: Desk, token: str, host_names: set[str]) -> ASGIApp:
    """The page and its API, below `/{token}/`.

    Args:
        desk: does what the page asks for.
        token: the word in the address.
        host_names: names, besides IP addresses, under which a browser may call this server.
    """

    async def show(request: Request) -> Response:
        query = request.query_params
        call = partial(
            desk.show, query.get("state", "all"), query.get("id"), query.get("step", "here")
        )
        return JSONResponse(await run_in_threadpool(call))

    async def picture(request: Request) -> Response:
        path = await run_in_threadpool(desk.picture, request.query_params.get("id", ""))
        if path is None:
            raise HTTPException(404, "the picture's file is missing, or not in images/")
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix.lower()])

    async def decide(request: Request) -> Response:
        body = await _json_object(request)
        text = None if body.get("text") is None else _string(body, "text")
        record = await run_in_threadpool(
            desk.decide,
            _string(body, "id"),
            _string(body, "version"),
            _string(body, "decision"),
            text,
        )
        return JSONResponse({"record": desk.view(record)})

    async def undo(request: Request) -> Response:
        body = await _json_object(request)
        record = await run_in_threadpool(desk.undo, _string(body, "id"), _string(body, "version"))
        return JSONResponse({"record": desk.view(record)})

    async def stale(_: Request, error: Exception) -> Response:
        assert isinstance(error, StaleError)
        body = {"error": "changed meanwhile", "record": desk.view(error.record)}
        return JSONResponse(body, 409)

    routes = [
        *(Route(f"/{name}", _page_file(*served)) for name, served in _PAGE_FILES.items()),
        Route("/picture", picture),
        Route("/api/show", show),
        Route("/api/decide", decide, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
    ]
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        exception_handlers={
            HTTPException: _http_error,
            StaleError: stale,
            UnknownRecordError: _refuse(404),
            UserError: _refuse(500),
            ValueError: _refuse(400),
        },
    )
    return _Guard(app, token, host_names)


class _Guard:
    """Lets only the page's own requests through, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, token: str, host_names: set[str]) -> None:
        self.app = app
        self.token = token.encode()
        self.host_names = host_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        assert scope["type"] == "http", "neither web sockets nor lifespan are served"
        refusal = self._refusal(scope)
        app = self.app if refusal is None else JSONResponse({"error": refusal}, 403)
        await app(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        word = scope["path"].removeprefix("/").partition("/")[0].encode(errors="replace")
        if not secrets.compare_digest(word, self.token):
            return "open the address that `latentmodal curate review` shows"
        host = headers.get("host", "")
        if not self._is_own(host):
            return f"host '{host}' is not this server"
        if headers.get("origin", f"http://{host}") not in (f"http://{host}", f"https://{host}"):
            return "another site's page may not ask"
        if scope["method"] not in ("GET", "HEAD") and headers.get(
            "sec-fetch-site", "same-origin"
        ) not in ("same-origin", "none"):
            return "another site's page may not decide"
        return None

    def _is_own(self, host: str) -> bool:
        """An IP address or a name given to this server: no foreign DNS stands behind either."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.host_names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _page_file(name: str, media_type: str) -> _Endpoint:
    async def send_file(_: Request) -> Response:
        return FileResponse(_PAGE / name, media_type=media_type)

    return send_file


def _refuse(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status)

    return answer


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _json_object(request: Request) -> dict[str, Any]:
    """The body of a decision.

    Raises:
        HTTPException: 413 too large, 415 not declared as JSON (a form of another site could send
            that without asking first), 400 no JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413, f"a decision has at most {MAX_BODY_BYTES} bytes")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a decision has at most {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is no JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is no JSON object")
    return body


def _string(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise HTTPException(400, f"'{key}' must be a string")
    return value
