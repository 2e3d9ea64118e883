"""Calls of the REST API within the process: whole answers, and answers that stream.

An ASGI application is a function; calling it needs no socket. Streams pass through piece by piece as they
are made, and end for the API too when the reader goes away.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.types import ASGIApp, Message

_PIECES_AHEAD = 8
"""Of a stream, that may wait for a slow reader."""
_LONGEST_DETAIL = 2000


class RefusedError(Exception):
    """The API said no; ``detail`` is fit to be shown."""

    def __init__(self, status: int, code: str, detail: str, retry_after: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """The head of an answer, and its body where it was read."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.body])


class Api:
    """The API as one person sees it, for the time of one request.

    Args:
        app: the API's application.
        token: the person's; empty: nobody's.
        request: the browser's, whose address and host the API is told.
    """

    def __init__(self, app: ASGIApp, token: str, request: Request) -> None:
        self._app = app
        self._token = token
        self._outer = request.scope

    async def get(self, *parts: str, **params: Any) -> Any:
        """The JSON value of an object of the API; raises `RefusedError`."""
        return await self.send("GET", *parts, params=params)

    async def find(self, *parts: str, **params: Any) -> Any | None:
        """As `get`; None where the API does not know of it (yet), or does not tell this person."""
        try:
            return await self.get(*parts, **params)
        except RefusedError as error:
            if error.status in (403, 404, 405):
                return None
            raise

    async def send(
        self, method: str, *parts: str, params: Mapping[str, Any] | None = None, body: Any = None
    ) -> Any:
        """Call with a JSON body; the answer's JSON value, None where it has none."""
        async with self.open(method, *parts, params=params, body=body) as answer:
            text = await answer.read()
        return json.loads(text) if text else None

    @asynccontextmanager
    async def open(
        self,
        method: str,
        *parts: str,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Answer]:
        """Call, and read the answer as it is made.

        Raises:
            RefusedError: it is an error.
        """
        scope = self._scope(method, parts, params or {}, body, headers or {})
        pieces: asyncio.Queue[Message | None] = asyncio.Queue(_PIECES_AHEAD)
        left = asyncio.Event()
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                content = b"" if body is None else json.dumps(body).encode()
                return {"type": "http.request", "body": content, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, pieces.put)
            except Exception:
                await pieces.put(None)
                raise
            await pieces.put(None)

        task = asyncio.create_task(run())
        ended = asyncio.Event()
        try:
            head = await pieces.get()
            if head is None:
                await task  # raises what kept it from answering
                raise _broken_off()
            answer = Answer(
                head["status"],
                {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in head["headers"]},
                _bodies(pieces, ended, task),
            )
            if answer.status >= 400:
                raise _refusal(answer, await answer.read())
            yield answer
        finally:
            left.set()
            if not ended.is_set():  # what the API does after its whole answer is its own matter
                task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _scope(
        self,
        method: str,
        parts: tuple[str, ...],
        params: Mapping[str, Any],
        body: Any,
        headers: Mapping[str, str],
    ) -> dict[str, Any]:
        path = "/v1/" + "/".join(parts)
        sent = {"accept": "application/json", **headers}
        if self._token:
            sent["authorization"] = f"Bearer {self._token}"
        if body is not None:
            sent["content-type"] = "application/json"
        given = {name: value for name, value in params.items() if value is not None}
        hosts = [(name, value) for name, value in self._outer["headers"] if name in (b"host", b"user-agent")]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": self._outer.get("scheme", "http"),
            "path": path,
            "raw_path": ("/v1/" + "/".join(quote(part, safe="") for part in parts)).encode(),
            "query_string": urlencode(given, doseq=True).encode(),
            "root_path": "",
            "headers": hosts
            + [(name.encode(), value.encode("latin-1", "replace")) for name, value in sent.items()],
            "client": self._outer.get("client"),
            "server": self._outer.get("server"),
            "state": {},
        }


async def _bodies(
    pieces: "asyncio.Queue[Message | None]", ended: asyncio.Event, task: "asyncio.Task[None]"
) -> AsyncIterator[bytes]:
    while (piece := await pieces.get()) is not None:
        if not piece.get("more_body"):
            ended.set()
        if content := piece.get("body"):
            yield content
        if ended.is_set():
            return
    await task  # raises why; half an answer must not look like a whole one
    raise _broken_off()


def _broken_off() -> RefusedError:
    return RefusedError(500, "error", "the manager broke off its answer - see its log")


def _refusal(answer: Answer, text: bytes) -> RefusedError:
    try:
        problem = json.loads(text)
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    detail = (
        problem.get("detail") or problem.get("message") or f"the manager answered with status {answer.status}"
    )
    return RefusedError(
        answer.status,
        str(problem.get("code", "error")),
        str(detail)[:_LONGEST_DETAIL],
        answer.headers.get("retry-after"),
    )
