"""The live server: the page of each run, fed while it trains, and the list of runs. It writes nothing.

Runs name layers, files and losses that are nobody else's business, and any web page can send requests to this machine:

- Every answer but a refusal needs the token, random for each start, which the printed address carries. The cookie that
  follows it is sent by this server's own pages only (`SameSite=Strict`) and read by no script (`HttpOnly`).
- Bound to this machine, it answers to the names of this machine alone: a foreign name that was made to lead here (DNS
  rebinding) has neither cookie nor answer.
- No other origin may read, embed or frame an answer, and pages run no script but the server's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import hashlib
import hmac
import importlib.resources
import ipaddress
import itertools
import json
import os
import platform
import secrets
import socket
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isograd._errors import IsogradError, RunNotFound
from isograd._live import HEARTBEAT, Follower, Live
from isograd._page import ASSETS, asset, render
from isograd._rule import Options

PORT = 8765
"""Where a free port is looked for, unless told otherwise."""

_TRIES = 20  # ports behind it that are tried before any free one is taken
_NICENESS = 10  # about a tenth of a core where the training wants all of them
_RETRY = 2000  # ms after which a page looks whether an ended server is back

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def serve(
    root: Path,
    *,
    run: str | None,
    host: str,
    port: int | None,
    token: str | None,
    options: Options,
    say: Callable[[str], None],
) -> None:
    """Serve the runs in `root` until Ctrl-C; `say` is told the address, which opens `run` or else the list.

    Raises IsogradError for an address that cannot be had and for a token that is no good.
    """
    token = _checked(token) if token is not None else secrets.token_urlsafe()
    live = Live(root, options)
    if run is not None:
        live.runs.folder(run)
    with bind(host, port) as listener:
        is_local, number = _is_local(listener), listener.getsockname()[1]
        hosts = {"localhost", "127.0.0.1", "[::1]", _spelled(host)} if is_local else None
        application = app(live, token=token, hosts=hosts, cookie=f"isograd-{number}")
        page = "" if run is None else f"runs/{quote(run, safe='')}"
        sentences = [
            f"{root} is served at http://{_address(host, listener)}:{number}/{page}?token={token} until Ctrl-C."
        ]
        if not is_local:
            sentences.append("Whoever has this address can read the runs, and what is sent is not encrypted.")
        server = _Server(application, live, functools.partial(say, "\n".join(sentences)))
        if hasattr(os, "nice"):
            os.nice(_NICENESS)
        # SQLite gives the interpreter away at each row: behind a thread that computes, every row would wait 5 ms.
        sys.setswitchinterval(0.0002)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            server.run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, application: ASGIApp, live: Live, say: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=1,  # for answers that nobody fetches
            )
        )
        self._live = live
        self._say = say
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._say()  # from now on it answers, and Ctrl-C ends it in good order

    async def main_loop(self) -> None:
        """Wait, where uvicorn's own loop wakes ten times a second to look whether it is to end."""
        await self.on_tick(0)  # sets the headers of all answers
        await self._ending.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._ending.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._live.close()  # streams never end by themselves, and would be waited for
        await super().shutdown(sockets)


def _checked(token: str) -> str:
    if len(token) < 8 or quote(token, safe="") != token:
        raise IsogradError("--token must have at least 8 characters, only letters, digits and - . _ ~.")
    return token


# ---- the address --------------------------------------------------------------------------------------------------


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; without `port` on a free one near 8765.

    Raises IsogradError where there is none to be had.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise IsogradError(f"--host {host!r} is no address or name that is known here.") from None
    failure: OSError | None = None
    numbers = [*range(PORT, PORT + _TRIES), 0] if port is None else [port]
    # A name can have addresses of which this machine lacks the kind, as `localhost` where there is no IPv6.
    for number, (family, *_, where) in itertools.product(numbers, found):
        try:
            return _listening(family, where, number)
        except OSError as error:  # noqa: PERF203 - some tries at most
            failure = error
    assert failure is not None
    if port and failure.errno == errno.EADDRINUSE:
        raise IsogradError(f"port {port} of {host} is taken: without --port a free one is found.")
    raise IsogradError(f"{host}, port {port or 'any'}, cannot be listened on ({failure.strerror or failure}).")


def _listening(family: int, where: tuple[Any, ...], port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that is started again gets the port that it just had. Elsewhere this option means to steal it.
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((where[0], port, *where[2:]))
        listener.listen(100)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _address(host: str, listener: socket.socket) -> str:
    """What to type in a browser to come to `host`."""
    is_any = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_unspecified
    return platform.node() if is_any else _spelled(host)


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


# ---- who may ask --------------------------------------------------------------------------------------------------


class _Gate:
    """In front of everything: lets pass who has the token and, where `hosts` are given, asks for one of them."""

    def __init__(self, inner: ASGIApp, *, token: str, hosts: set[str] | None, cookie: str) -> None:
        self._inner = inner
        self._token = token.encode()
        self._hosts = hosts
        self._cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        had = request.cookies.get(self._cookie, "")
        is_foreign = self._hosts is not None and _hostname(request) not in self._hosts
        is_trusted = not is_foreign and self._is_right(had, *request.query_params.getlist("token"))

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if is_trusted and not self._is_right(had):
                    value = f"{self._cookie}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict"
                    headers.append("Set-Cookie", value)
            await send(message)

        inner: ASGIApp = self._inner
        if is_foreign:
            inner = PlainTextResponse("This server answers to the names of its own machine only.\n", 421)
        elif not is_trusted:
            inner = PlainTextResponse("Open the address that `isograd serve` has printed: it carries the token.\n", 403)
        await inner(scope, receive, send_guarded)

    def _is_right(self, *tokens: str) -> bool:
        # In constant time: how long it takes tells nothing of the token.
        return any(hmac.compare_digest(token.encode(), self._token) for token in tokens)


def _hostname(request: Request) -> str:
    """The host that was asked for, without its port."""
    host = request.headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


# ---- what is answered ---------------------------------------------------------------------------------------------


def app(live: Live, *, token: str, hosts: set[str] | None, cookie: str) -> ASGIApp:
    """The application: `hosts` are the names that it answers to, None for any; `cookie` is the cookie's name."""

    def route(path: str, answer: Callable[[Live, Request], Awaitable[Response]]) -> Route:
        return Route(path, _endpoint(functools.partial(answer, live)), methods=["GET"])

    routes = [
        route("/", _list_page),
        route("/runs/{run}", _run_page),
        route("/compare", _compare_page),
        route("/static/{name}", _static),
        route("/api/runs", _runs),
        route("/api/runs/{run}/data", _data),
        route("/api/runs/{run}/detail", _detail),
        route("/api/runs/{run}/events", _events),
    ]
    refused = {HTTPException: _refused, IsogradError: _refused}
    inner = Starlette(routes=routes, exception_handlers=refused)
    inner.router.redirect_slashes = False
    return _Gate(inner, token=token, hosts=hosts, cookie=cookie)


def _endpoint(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await answer(request)

    return endpoint


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        status, sentence = error.status_code, str(error.detail)
    else:
        status, sentence = (404 if isinstance(error, RunNotFound) else 409), str(error)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": sentence}, status)
    return PlainTextResponse(f"{sentence}\n", status)


async def _list_page(live: Live, request: Request) -> Response:
    return _tagged(request, _own("runs.html"), "text/html; charset=utf-8")


async def _run_page(live: Live, request: Request) -> Response:
    return HTMLResponse(render(live=await _place(live, request.path_params["run"])))


async def _compare_page(live: Live, request: Request) -> Response:
    first, second = [await _place(live, request.query_params.get(key, "")) for key in ("a", "b")]
    return HTMLResponse(render(live=first, compare=second))


async def _place(live: Live, run: str) -> str:
    return f"api/runs/{quote((await live.folder(run)).name, safe='')}"


async def _static(live: Live, request: Request) -> Response:
    name = request.path_params["name"]
    if name == "runs.js":
        return _tagged(request, _own(name), "text/javascript; charset=utf-8")
    if name not in ASSETS:
        raise HTTPException(404)
    body, etag = _asset(name)
    return _tagged(request, body, ASSETS[name], etag)


async def _runs(live: Live, request: Request) -> Response:
    facts = ("id", "state", "started", "steps", "script")
    runs = await live.read(live.runs.summaries)
    told = [{key: getattr(run, key) for key in facts} | {"subjects": list(run.subjects)} for run in runs]
    return _tagged(request, json.dumps(told).encode(), "application/json")


async def _data(live: Live, request: Request) -> Response:
    data = await live.data(request.path_params["run"])
    return _tagged(request, data.body, "application/json", data.etag)


async def _detail(live: Live, request: Request) -> Response:
    run = (await live.folder(request.path_params["run"])).name
    first, last, columns = (_whole(request, *which) for which in (("first", None), ("last", None), ("columns", 400)))
    if not 0 <= first <= last or not 2 <= columns <= 4000:
        raise HTTPException(400, "first must not be behind last, and columns be 2 to 4000")
    return Response(await live.detail(run, first=first, last=last, columns=columns), media_type="application/json")


def _whole(request: Request, name: str, default: int | None) -> int:
    text = request.query_params.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise HTTPException(400, f"{name} must be a whole number")
    return int(text)


async def _events(live: Live, request: Request) -> Response:
    run = (await live.folder(request.path_params["run"])).name
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    # X-Accel-Buffering: a proxy in between, as nginx, passes on at once.
    return StreamingResponse(_stream(live, run), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _stream(live: Live, run: str) -> AsyncGenerator[str, None]:
    yield f"retry: {_RETRY}\n\n"
    with contextlib.suppress(RunNotFound):
        async with live.follow(run) as follower, contextlib.aclosing(_told(live, follower)) as events:
            async for event in events:
                yield event


async def _told(live: Live, follower: Follower) -> AsyncGenerator[str, None]:
    """What happens to a run, told for as long as somebody listens."""
    count, state, etag = 0, "", ""
    while not live.is_closed:
        changed = follower.changed  # before looking: what comes while this is told is told next
        if follower.state != state:
            state = follower.state
            yield _event("state", {"state": state})
        if follower.etag != etag:
            etag = follower.etag
            yield _event("data", {"etag": etag})
        count, lines = follower.since(count)
        if lines:
            subjects = {subject: {"lines": found} for subject, found in lines.items()}
            yield _event("tail", {"subjects": subjects, "steps": follower.steps, "state": state})
        if state == "deleted":
            return
        try:
            await asyncio.wait_for(changed.wait(), HEARTBEAT)
        except asyncio.TimeoutError:
            yield ": \n\n"


def _event(kind: str, data: object) -> str:
    return f"event: {kind}\ndata: {json.dumps(data, allow_nan=False, separators=(',', ':'))}\n\n"


def _tagged(request: Request, body: bytes, kind: str, etag: str = "") -> Response:
    """`body`, or that it has not changed since the browser fetched it."""
    etag = etag or _tag(body)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)


def _tag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


@functools.cache
def _asset(name: str) -> tuple[bytes, str]:
    body = asset(name)
    return body, _tag(body)


def _own(name: str) -> bytes:
    return (importlib.resources.files("isograd") / "page" / name).read_bytes()
