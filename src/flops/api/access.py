"""Who may come in: the token, the name the manager was called by, and how much may be sent.

A browser can be made to send requests to loopback by any web page; without the token it gets nothing, and
with a foreign name in the Host header (DNS rebinding) not even an answer that says so.
"""

import hmac
from collections.abc import Callable
from http import HTTPStatus

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.api.problems import problem
from flops.core.errors import InvalidInputError, UnauthorizedError

_OWN_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def bearer_token(request: Request) -> str:
    """Raises: UnauthorizedError: the request brings none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthorizedError("the request brings no token - send 'Authorization: Bearer TOKEN'")
    return token.strip()


def only_with(token: str) -> Callable[[Request], None]:
    """A dependency that lets in who brings the token; compared in constant time."""
    expected = token.encode()

    def check(request: Request) -> None:
        if not hmac.compare_digest(bearer_token(request).encode(), expected):
            raise UnauthorizedError("the token is wrong - it is in the file 'token' of the FLOPS_HOME")

    return check


class OwnNamesOnly:
    """Refuses requests that were sent to another name than this machine's loopback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            name = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
            if not name.endswith("]"):
                name = name.rpartition(":")[0] or name
            if name.lower() not in _OWN_NAMES:
                answer = problem(
                    HTTPStatus.MISDIRECTED_REQUEST,
                    InvalidInputError.code,
                    "the manager answers to 127.0.0.1 and localhost only - use its own address",
                )
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LimitedBody:
    """Ends requests whose body is over a limit, before it is in memory.

    Args:
        limit_bytes: for a path.
    """

    def __init__(self, app: ASGIApp, limit_bytes: Callable[[str], int]) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_bytes(scope["path"])
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        detail = f"the request's body is over the limit of {limit} bytes - send less"
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value) > limit):
                await problem(status, InvalidInputError.code, detail)(scope, receive, send)
                return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # FastAPI turns any other exception into "error parsing the body".
                raise HTTPException(status, detail)
            return message

        await self._app(scope, counted, send)
