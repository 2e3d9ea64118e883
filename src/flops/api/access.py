"""Who may come in: the token, what it is good for, the name the manager was called by, how much may be sent.

A browser can be made to send requests to loopback by any web page; without the token it gets nothing, and
with a foreign name in the Host header (DNS rebinding) not even an answer that says so.
"""

import asyncio
import hmac
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.api.policy import ANYBODY, NOT_AUDITED, READS, permission_of
from flops.api.problems import problem
from flops.core import tokens
from flops.core.clock import Clock, SystemClock
from flops.core.errors import (
    FlopsError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
)
from flops.core.ids import project_id
from flops.core.recent import Recent
from flops.fleet import JoinedNode
from flops.identity import ADMIN, Attempts, Caller, RateLimit, Role
from flops.manager import Manager, Sight
from flops.telemetry import about, current_request, is_request

log = logging.getLogger(__name__)

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
_PER_S, _BURST = 50.0, 500
"""Requests of one token."""
_KEPT_S, _MANY_PROJECTS = 5.0, 1000
_SHOWN = 18
"""Of a token: ``flops_`` and its id, which is no secret."""
SHOWN_OF_NODE = 22
"""Of a node's credential, and of a join token: the same."""


def bearer_token(request: Request) -> str:
    """Raises: UnauthorizedError: the request brings none."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise UnauthorizedError("the request brings no token - send 'Authorization: Bearer TOKEN'")
    return token.strip()


def caller_of(request: Request) -> Caller:
    """Who asks, once `Guard` has let the request in."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def sight_of(request: Request) -> Sight | None:
    """Whose models the caller sees; None: everybody's."""
    caller = caller_of(request)
    return None if caller.sees_all else Sight(caller.user, caller.teams)


class Limits:
    """Against guessing tokens, whatever they are for, and against asking too often."""

    def __init__(self, clock: Clock | None = None) -> None:
        clock = clock or SystemClock()
        self._by_token = Attempts(clock)
        self._by_address = Attempts(clock, free=100)
        self._rate = RateLimit(clock, per_s=_PER_S, burst=_BURST)

    def take(self, token: str) -> None:
        """Raises: TooManyRequestsError: this token asks too often."""
        self._rate.take(token)

    @contextmanager
    def trying(self, request: Request, text: str, shown: int) -> Iterator[None]:
        """Inside, a token is looked up.

        Args:
            shown: how many of its letters are no secret.
        Raises:
            TooManyRequestsError: too many wrong ones came from there.
        """
        address = request.client.host if request.client is not None else ""
        known = f"{address} for '{text[:shown]}'"
        self._by_token.check(known)
        self._by_address.check(address)
        try:
            yield
        except UnauthorizedError:
            self._by_token.failed(known)
            self._by_address.failed(address)
            raise
        self._by_token.succeeded(known)


class Guard:
    """A dependency of all routes of users: who asks, and whether they may.

    Args:
        token: of the FLOPS_HOME's own user, who may do everything.
    """

    def __init__(self, manager: Manager, token: str, limits: Limits) -> None:
        self._manager = manager
        self._token = token.encode()
        self._limits = limits
        self._belongs: Recent[str, tuple[str, str | None]] = Recent(
            SystemClock(), kept_s=_KEPT_S, most=_MANY_PROJECTS
        )

    async def __call__(self, request: Request) -> None:
        caller = request.state.caller = await self.identified(request)
        permission = permission_of(request.method, request.scope["route"].path)
        if permission is None or (permission != ANYBODY and not caller.may(permission)):
            raise ForbiddenError(
                f"{caller.user} ({caller.role}) may not {request.method} {request.url.path} with this token"
                f"{f', it takes {permission}' if permission else ''} - ask an admin"
            )
        if (project := request.path_params.get("project")) is not None:
            await self._check_project(caller, project, changes=request.method not in READS)

    async def identified(self, request: Request, token: str | None = None) -> Caller:
        """Who brings a token: the request's own, where none is given.

        Raises:
            UnauthorizedError: no user has this token.
            TooManyRequestsError: see `Limits`.
        """
        text = bearer_token(request) if token is None else token
        if hmac.compare_digest(text.encode(), self._token):
            return Caller(ADMIN, Role.ADMIN)
        with self._limits.trying(request, text, _SHOWN):
            identity = self._manager.identity
            # A hop to a thread costs as much as a whole answer.
            known = identity.recent_caller(text)
            caller = known if known is not None else await run_in_threadpool(identity.caller, text)
        if caller.token:  # whoever has the token file has the machine
            self._limits.take(caller.token)
        return caller

    async def _check_project(self, caller: Caller, project: str, *, changes: bool) -> None:
        """Whoever may not see a project is told what they would be told if it were not there."""
        if caller.sees_all and not changes:
            return
        checked = project_id(project)
        belongs = self._belongs.get(checked)  # nothing changes it but the project's removal
        if belongs is None:
            belongs = await run_in_threadpool(self._manager.belongs_to, checked)
            self._belongs.keep(checked, belongs)
        owner, team = belongs
        if not caller.sees(owner, team):
            raise NotFoundError(f"there is no project {checked} - see 'flops ls'")
        if changes and not caller.owns(owner, team):
            raise ForbiddenError(f"project {checked} is {owner}'s - ask them, or an admin")


class NodeGuard:
    """A dependency of the routes of joined nodes, which are for them alone."""

    def __init__(self, manager: Manager, guard: Guard, limits: Limits) -> None:
        self._manager = manager
        self._guard = guard
        self._limits = limits

    async def __call__(self, request: Request) -> None:
        text = bearer_token(request)
        if not text.startswith(f"{tokens.NODE}_"):
            caller = request.state.caller = await self._guard.identified(request)
            raise ForbiddenError(
                f"{caller.user} may not {request.method} {request.url.path}, it is for machines that "
                "joined - see 'flops node ls'"
            )
        with self._limits.trying(request, text, SHOWN_OF_NODE):
            node = await run_in_threadpool(self._proven, text)
        self._limits.take(node.credential)
        request.state.node = node
        request.state.about = f"node {node.name} of {node.owner}"

    def _proven(self, text: str) -> JoinedNode:
        node = self._manager.joined.store.proven(text)
        if self._manager.identity.user(node.owner).disabled:
            raise UnauthorizedError(f"{node.owner}, whose node {node.name} is, is shut out - ask an admin")
        return node


def node_of(request: Request) -> JoinedNode:
    """Which node asks, once `NodeGuard` has let the request in."""
    node = request.state.node
    assert isinstance(node, JoinedNode)
    return node


class Audited:
    """Writes what was asked, by whom, and what became of it into the audit log, before it is answered.

    Requests that change nothing are written where they are refused.
    """

    def __init__(self, app: ASGIApp, manager: Manager) -> None:
        self._app = app
        self._manager = manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and _counts(scope, message["status"]):
                await asyncio.to_thread(self._append, scope, message["status"])
            await send(message)

        await self._app(scope, receive, noted)

    def _append(self, scope: Scope, status: int) -> None:
        state: dict[str, Any] = scope.get("state", {})
        caller, node = state.get("caller"), state.get("node")
        user, token = (caller.user, caller.token) if caller is not None else ("", "")
        if node is not None:
            user, token = node.owner, node.credential
        with about(project=_project(scope)):
            log.info("%s %s: %s, for %s", scope["method"], _route(scope), status, user or "nobody")
        client = scope.get("client")
        try:
            self._manager.audit.append(
                user=user,
                token=token,
                address=client[0] if client else "",
                action=f"{scope['method']} {_route(scope)}",
                object=state.get("about") or scope["path"],
                outcome=status,
                detail={"request": current_request()},
            )
        except FlopsError:
            log.exception("the audit log has no entry of %s %s", scope["method"], scope["path"])


def _counts(scope: Scope, status: int) -> bool:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return True
    if scope.get("state", {}).get("only_reads"):
        return False
    if scope["method"] in (*READS, "OPTIONS") or status == HTTPStatus.TOO_MANY_REQUESTS:
        return False
    return (scope["method"], _route(scope)) not in NOT_AUDITED


def _project(scope: Scope) -> str | None:
    """The project that a request is about, be it the one that it made."""
    made = str(scope.get("state", {}).get("about") or "")
    if made.startswith("project "):
        return made.removeprefix("project ")
    found = scope.get("path_params", {}).get("project")
    return found if isinstance(found, str) and is_request(found) else None


def _route(scope: Scope) -> str:
    route = scope.get("route")
    return str(route.path) if route is not None else str(scope["path"])


class OwnNamesOnly:
    """Refuses requests that were sent to another name than one of the manager's.

    Args:
        names: as they stand in the Host header, without a port.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] = LOOPBACK) -> None:
        self._app = app
        self._names = frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            name = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
            if not name.endswith("]"):
                name = name.rpartition(":")[0] or name
            if name.lower() not in self._names:
                answer = problem(
                    HTTPStatus.MISDIRECTED_REQUEST,
                    InvalidInputError.code,
                    f"the manager answers to {', '.join(sorted(self._names))} only - use its own address",
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
