"""Routes of signing in with an issuer: for whoever has no token yet, so each of them is careful by itself."""

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from flops.api.problems import documented
from flops.core.clock import Clock, SystemClock
from flops.core.errors import FlopsError, InvalidInputError, NotFoundError, UnauthorizedError
from flops.identity import Attempts, Caller, RateLimit, Role
from flops.manager import Manager

if TYPE_CHECKING:
    from flops.identity.signing_in import SignIns

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PATH = "/login/oidc"
_BEGUN_PER_S, _BURST = 1.0, 30
"""From one address."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SignInView(BaseModel):
    issuer: Annotated[str | None, Field(description="Host of who one signs in with; null: with tokens only")]


class WantedSignIn(_Request):
    redirect_uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=300,
            description="Where the person comes back to: /login/oidc of this manager, or of loopback",
        ),
    ]


class BegunSignIn(BaseModel):
    url: Annotated[str, Field(description="Where the person goes to say who they are")]
    state: Annotated[str, Field(description="What comes back from there")]
    secret: Annotated[str, Field(description="To be kept by whoever began, and shown to finish")]


class ReturnedSignIn(_Request):
    state: Annotated[str, Field(min_length=1, max_length=100)]
    secret: Annotated[str, Field(min_length=1, max_length=100)]
    code: Annotated[str, Field(min_length=1, max_length=4096)]
    iss: Annotated[str | None, Field(max_length=500, description="As it came back, if it did")] = None


class SignedInView(BaseModel):
    token: Annotated[str, Field(description="Good for some hours; its text, which nobody can ask for again")]
    id: str
    user: str
    role: Role
    expires: float | None


def sign_in_routes(manager: Manager, clock: Clock | None = None) -> APIRouter:
    """Open to everybody."""
    routes = APIRouter(prefix="/v1/oidc", tags=["identity"])
    clock = clock or SystemClock()
    begun = RateLimit(clock, per_s=_BEGUN_PER_S, burst=_BURST)
    failed = Attempts(clock, what="failed sign-ins")

    @routes.get("", response_model=SignInView, summary="Whom one can sign in with, besides tokens")
    async def get_sign_in() -> Any:
        issuer = manager.settings.issuer
        return {"issuer": issuer.host if issuer is not None else None}

    @routes.post(
        "/begin",
        response_model=BegunSignIn,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
        summary="Begin to sign in with the issuer: the address where a person goes",
    )
    async def begin_sign_in(wanted: WantedSignIn, request: Request) -> Any:
        sign_ins = _there(manager)
        begun.take(_address(request))
        return vars(await sign_ins.begin(_checked(wanted.redirect_uri, request)))

    @routes.post(
        "/finish",
        response_model=SignedInView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT, HTTPStatus.SERVICE_UNAVAILABLE),
        summary="Finish signing in with what came back from the issuer: a token",
    )
    async def finish_sign_in(returned: ReturnedSignIn, request: Request) -> Any:
        sign_ins = _there(manager)
        address = _address(request)
        failed.check(address)
        request.state.about = "sign-in"
        try:
            account = await sign_ins.account(returned.state, returned.secret, returned.code, returned.iss)
            request.state.about = f"sign-in of {account.name}, subject {account.subject}"
            user, token, text = await asyncio.to_thread(sign_ins.admit, account)
        except FlopsError as error:
            if isinstance(error, UnauthorizedError):
                failed.failed(address)
            request.state.about += f": {error}"
            raise
        request.state.caller = Caller(user.name, user.role, token=token.id)
        return {
            "token": text,
            "id": token.id,
            "user": user.name,
            "role": user.role,
            "expires": token.expires,
        }

    return routes


def _there(manager: Manager) -> "SignIns":
    if manager.sign_ins is None:
        raise NotFoundError("nobody can sign in here but with a token - an operator sets FLOPS_OIDC_ISSUER")
    return manager.sign_ins


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _checked(redirect_uri: str, request: Request) -> str:
    """Raises: InvalidInputError: codes would go to somebody else.

    The Host header is one of the manager's own names: `OwnNamesOnly`.
    """
    if redirect_uri == f"{request.url.scheme}://{request.headers.get('host', '')}{_PATH}":
        return redirect_uri
    try:
        parts = urlsplit(redirect_uri)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    name = f"[{host}]" if host == "::1" else host
    if host not in _LOOPBACK or not port or redirect_uri != f"http://{name}:{port}{_PATH}":
        raise InvalidInputError(
            f"'{redirect_uri[:80]}' is no place to come back to - use {_PATH} of the manager's own address, "
            f"or http://127.0.0.1:PORT{_PATH}"
        )
    return redirect_uri
