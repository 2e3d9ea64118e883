"""MLflow behind the manager: its GUI and REST API at `/mlflow/`, for whoever is signed in, to be read.

Who asks is found out here, as for every other request, and MLflow is told whose runs they see; it filters by
itself (`flops.tracking.visibility`). What it is asked is closed by default: the tables below name the paths
that may be read and, by admins, changed. Left out are those that run things, that reach out to other machines
or to files, and whatever MLflow adds one day.

Bodies stream. Neither tokens nor cookies get to MLflow, and none come from it.
"""

import asyncio
import html
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from urllib.parse import quote, urlsplit

import httpx
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.api.access import Guard
from flops.api.beside import Pages
from flops.api.problems import problem, status_of
from flops.core.errors import (
    FlopsError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.identity import Caller, Role
from flops.manager import Manager
from flops.tracking import CHANGES, EVERYTHING, GUI_PREFIX, audience

log = logging.getLogger(__name__)

_MAX_BODY_BYTES = 1 << 20
_AT_ONCE = 64
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no authority: over the socket goes plain HTTP, and the system's authorities take long to read."""
_PIECE_BYTES = 1 << 16
_ANSWERED = "/mlflow/{path}"
"""The route, as the audit log and the figures name it."""

_REST = r"/(?:ajax-)?api/[23]\.0/mlflow/"
_STATIC = re.compile(r"/static-files/(?:[\w@-][\w.@-]*/)*[\w@-][\w.@-]*")
_ARTIFACTS = re.compile(r"/get-artifact|/model-versions/get-artifact|.*/artifacts/files")


def _paths(*endings: str) -> re.Pattern[str]:
    return re.compile("|".join(ending if ending[:1] == "/" else _REST + ending for ending in endings))


READABLE: Mapping[str, re.Pattern[str]] = {
    "GET": _paths(
        "/",
        "/version",
        _STATIC.pattern,
        "/get-artifact",
        "/model-versions/get-artifact",
        "server-info",
        "experiments/(?:get|get-by-name|search)",
        "runs/get",
        "metrics/(?:get-history|get-history-bulk|get-history-bulk-interval)",
        "artifacts/list",
        "registered-models/(?:get|search|alias|get-latest-versions)",
        "model-versions/(?:get|search|get-download-uri)",
        "logged-models/m-[0-9a-f]{32}",
        "logged-models/m-[0-9a-f]{32}/artifacts/(?:directories|files)",
    ),
    "POST": _paths(
        "/graphql",
        "experiments/(?:search|search-datasets)",
        "runs/search",
        "registered-models/get-latest-versions",
        "logged-models/search",
    ),
}
CHANGEABLE: Mapping[str, re.Pattern[str]] = {
    "POST": _paths(
        "experiments/(?:update|delete|restore|set-experiment-tag)",
        "runs/(?:update|delete|restore|set-tag|delete-tag)",
        "registered-models/(?:set-tag|alias)",
        "model-versions/set-tag",
    ),
    "PATCH": _paths("registered-models/update", "model-versions/update"),
    "DELETE": _paths(
        "registered-models/(?:delete-tag|alias)", "model-versions/delete-tag", "experiments/delete-tag"
    ),
}
"""What an admin may do: names, descriptions, tags, and a waste basket that gives back."""

_SENT = ("accept", "accept-encoding", "content-type", "if-none-match", "if-modified-since", "range")
_RETURNED = (
    *("content-type", "content-length", "content-encoding", "content-disposition", "content-range"),
    *("accept-ranges", "etag", "last-modified"),
)
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class _Route:
    path = _ANSWERED


class Behind:
    """Answers requests for MLflow; all others go on.

    Args:
        guard: knows who brings a token.
        pages: know who is signed in with a browser; None: nobody.
    """

    def __init__(self, app: ASGIApp, manager: Manager, guard: Guard, pages: Pages | None) -> None:
        self._app = app
        self._manager = manager
        self._guard = guard
        self._pages = pages
        self._inside = 0
        self._starting: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_behind(scope["path"]):
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["only_reads"] = True
        scope["route"] = _Route
        request = Request(scope, receive)
        try:
            answer = await self._answer(request)
        except FlopsError as error:
            answer = await self._refusal(request, error)
        answer.headers.update({name: value for name, value in _ALWAYS.items() if name not in answer.headers})
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        caller = await self._caller(request)
        path = str(request.scope["path"]).removeprefix(GUI_PREFIX)
        request.state.about = path[:200]
        if not self._manager.gui_address.startswith("/"):
            return RedirectResponse(self._manager.gui_address, HTTPStatus.SEE_OTHER)
        if not path:
            return RedirectResponse(f"{GUI_PREFIX}/", HTTPStatus.SEE_OTHER)
        audiences = _audiences(caller, request.method, path)
        request.state.only_reads = audiences != CHANGES
        if self._inside >= _AT_ONCE:
            raise UnavailableError(f"MLflow has {_AT_ONCE} requests to answer already - try again later")
        body = await _body(request)
        try:
            return await self._ask(request, path, body, audiences)
        except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
            # It does not run, or has just ended; what changes something is not asked twice.
            if audiences == CHANGES:
                raise UnavailableError("MLflow went away - see whether it did what you asked") from None
        await self._ready(request)
        try:
            return await self._ask(request, path, body, audiences)
        except httpx.TransportError as error:
            raise UnavailableError("MLflow went away - try again") from error

    async def _caller(self, request: Request) -> Caller:
        """Raises: UnauthorizedError, ForbiddenError: nobody, or nobody who may see runs, asks."""
        token = None
        if "authorization" not in request.headers:
            token = self._pages.token_of(request) if self._pages is not None else ""
            if not token:
                raise UnauthorizedError(
                    "nobody is signed in - sign in, or send 'Authorization: Bearer TOKEN'"
                )
            _check_origin(request)
        caller = await self._guard.identified(request, token)
        request.state.caller = caller
        if not (caller.may("projects:read") and caller.may("models:read")):
            raise ForbiddenError(
                f"{caller.user} ({caller.role}) may not see runs and models with this token - ask an admin"
            )
        return caller

    async def _ready(self, request: Request) -> None:
        """MLflow runs; a browser is told to wait where it does not yet.

        Raises:
            _StartingError: look again soon.
            UnavailableError: it does not get ready.
        """
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(asyncio.to_thread(self._manager.start_gui))
        if _is_visit(request):
            await asyncio.wait([self._starting], timeout=0.5)
            if not self._starting.done():
                raise _StartingError("MLflow is being started - look again in some seconds")
        await asyncio.shield(self._starting)

    async def _ask(self, request: Request, path: str, body: bytes, audiences: str) -> Response:
        door = await asyncio.to_thread(lambda: self._manager.gui_door)
        headers = {name: request.headers[name] for name in _SENT if name in request.headers}
        headers |= door.headers(audiences)
        target = quote(f"{GUI_PREFIX}{path}")
        if request.url.query:
            target += f"?{request.url.query}"
        self._inside += 1
        client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(door.socket), verify=_NOBODY),
            base_url="http://localhost",
            timeout=_TIMEOUT,
            trust_env=False,
        )

        async def leave() -> None:
            self._inside -= 1
            await client.aclose()

        try:
            asked = client.build_request(request.method, target, headers=headers, content=body)
            found = await client.send(asked, stream=True)
        except httpx.TimeoutException as error:
            await leave()
            raise UnavailableError(
                f"MLflow did not answer within {_TIMEOUT.read:g} s - ask for less"
            ) from error
        except BaseException:
            await leave()
            raise
        answer = _Relayed(found, leave)
        answer.headers["Content-Security-Policy"] = _policy(request, path)
        is_kept = _STATIC.fullmatch(path) and found.is_success
        answer.headers["Cache-Control"] = "private, max-age=86400" if is_kept else "no-store"
        return answer

    async def _refusal(self, request: Request, error: FlopsError) -> Response:
        status = status_of(error)
        if isinstance(error, _StartingError):
            return HTMLResponse(_WAIT.format(html.escape(str(error))), status, {"Refresh": "2"})
        if self._pages is not None and _is_visit(request):
            if isinstance(error, UnauthorizedError):
                return self._pages.to_login(request)
            return await self._pages.problem(request, status, str(error))
        return problem(status, error.code, str(error))


class _Relayed(StreamingResponse):
    """An answer of MLflow's, passed on as it comes; ``leave`` is called once, however it ends."""

    def __init__(self, found: httpx.Response, leave: Callable[[], Awaitable[None]]) -> None:
        super().__init__(found.aiter_raw(_PIECE_BYTES), found.status_code)
        for name in _RETURNED:
            if name in found.headers:
                self.headers[name] = found.headers[name]
        self._found = found
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._found.aclose()
            await self._leave()


class _StartingError(UnavailableError):
    """For a browser, which looks again by itself."""


_WAIT = '<!doctype html><html lang="en"><meta charset="utf-8"><title>MLflow · FLOps</title><p>{}.</p></html>'


def gui_url(manager: Manager, request: Request) -> str:
    """The whole address of MLflow's GUI for whoever asks, once it answers.

    Raises:
        UnavailableError: it does not get ready.
    """
    manager.start_gui()
    address = manager.gui_address
    return f"{request.url.scheme}://{request.url.netloc}{address}/" if address.startswith("/") else address


def is_behind(path: str) -> bool:
    """Whether a path is MLflow's."""
    return path == GUI_PREFIX or path.startswith(f"{GUI_PREFIX}/")


def _audiences(caller: Caller, method: str, path: str) -> str:
    """As whom MLflow is asked.

    Raises:
        ForbiddenError: the caller may not change it.
        NotFoundError: it is closed to everybody.
    """
    if method in READABLE and READABLE[method].fullmatch(path):
        if caller.sees_all:
            return EVERYTHING
        teams = (audience("", team) for team in caller.teams)
        return ",".join(sorted({audience(caller.user, None), *teams}))
    if method in CHANGEABLE and CHANGEABLE[method].fullmatch(path):
        if caller.role is Role.ADMIN and caller.may("projects:write") and caller.may("models:write"):
            return CHANGES
        raise ForbiddenError("runs and models are changed by admins alone here - ask one")
    raise NotFoundError(
        f"{method[:10]} {GUI_PREFIX}{path[:100]} is not served here - MLflow is here to be read"
    )


def _is_visit(request: Request) -> bool:
    """Whether a browser opens a page."""
    is_page = request.headers.get("accept", "").startswith("text/html")
    return request.method == "GET" and is_page and "authorization" not in request.headers


def _check_origin(request: Request) -> None:
    """Raises: ForbiddenError: a page of another site, or of another port, makes the browser ask."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = (request.url.scheme, request.headers.get("host", ""))
    foreign = origin is not None and (urlsplit(origin).scheme, urlsplit(origin).netloc) != own
    if foreign or (site not in (None, "same-origin", "none") and not _is_visit(request)):
        raise ForbiddenError("the request came from another site - open MLflow from the manager's pages")


async def _body(request: Request) -> bytes:
    """Raises: InvalidInputError: it is too large."""
    if request.method == "GET":
        return b""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MAX_BODY_BYTES:
            raise InvalidInputError(
                f"the request's body is over the limit of {_MAX_BODY_BYTES} bytes - send less"
            )
        parts.append(part)
    return b"".join(parts)


def _policy(request: Request, path: str) -> str:
    """What a browser may do with an answer.

    MLflow's pages have the manager's origin: they are kept to their own paths, so that a script that somebody
    smuggles into them, or into an artifact, reaches none of the manager's pages.
    """
    if _ARTIFACTS.fullmatch(path):
        return "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
    if path != "/" and not _STATIC.fullmatch(path):
        return "default-src 'none'; frame-ancestors 'none'"
    host = request.headers.get("host", "")
    own = f"{request.url.scheme}://{host}{GUI_PREFIX}/" if re.fullmatch(r"[\w.:\[\]-]+", host) else "'none'"
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {own} 'unsafe-eval'",
            f"worker-src {own} blob:",
            f"style-src {own} 'unsafe-inline'",
            f"img-src {own} data: blob:",
            f"font-src {own} data:",
            f"connect-src {own}",
            f"manifest-src {own}",
            f"frame-src {own} blob:",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    )
