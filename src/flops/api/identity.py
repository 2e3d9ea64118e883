"""Routes of users, tokens and the audit log."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from flops.api.access import caller_of
from flops.api.problems import documented
from flops.core.errors import ForbiddenError, NotFoundError
from flops.identity import AuditEntry, Caller, Role, Token, User, check_scopes
from flops.manager import Manager

_Role = Annotated[Role, Field(strict=False)]
_Name = Annotated[str, Field(min_length=1, max_length=60)]
_OfUser = Annotated[str, Path(max_length=60)]
_Number = Annotated[str, Path(max_length=20)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Me(BaseModel):
    user: str
    role: Role
    teams: list[str]
    scopes: list[str]
    expires: float | None
    token: Annotated[str | None, Field(description="Its id; null: the token file of the FLOPS_HOME")]
    signed_in: Annotated[bool, Field(description="The token came from signing in with the issuer")]


class UserView(BaseModel):
    name: str
    role: Role
    teams: list[str]
    disabled: bool
    created: float
    issuer: Annotated[str | None, Field(description="With which they sign in")]


class UserList(BaseModel):
    users: list[UserView]


class NewUser(_Request):
    name: _Name
    role: _Role = Role.ENGINEER
    teams: list[_Name] = []


class UserChange(_Request):
    role: _Role | None = None
    teams: list[_Name] | None = None
    disabled: bool | None = None
    unbind: Annotated[bool, Field(description="Forget who they are at the issuer")] = False


class TokenView(BaseModel):
    id: str
    user: str
    name: str
    scopes: list[str]
    created: float
    expires: float | None
    last_used: float | None
    revoked: float | None
    signed_in: bool


class TokenList(BaseModel):
    tokens: list[TokenView]


class NewToken(_Request):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    user: Annotated[_Name | None, Field(description="Whose; yours, where it is left out")] = None
    scopes: Annotated[
        list[str] | None, Field(max_length=40, description="Such as projects:read; all, where it is left out")
    ] = None
    expires_s: Annotated[float | None, Field(gt=0, description="From now; never, where it is left out")] = (
        None
    )


class MadeToken(TokenView):
    token: Annotated[str, Field(description="Its text, which nobody can ask for again")]


class AuditEntryView(BaseModel):
    seq: int
    time: float
    user: str
    token: str
    address: str
    action: str
    object: str
    outcome: int
    detail: dict[str, Any]
    hash: str


class AuditList(BaseModel):
    entries: list[AuditEntryView]


class VerificationRequest(_Request):
    head: Annotated[str | None, Field(max_length=100, description="NUMBER:HASH of an earlier one")] = None


class VerificationView(BaseModel):
    ok: bool
    entries: int
    head: str
    broken_at: int | None
    reason: str | None


def authority_routes(manager: Manager) -> APIRouter:
    """For whoever has no token yet."""
    routes = APIRouter(prefix="/v1", tags=["identity"])

    @routes.get(
        "/authority",
        response_class=PlainTextResponse,
        responses={404: documented(HTTPStatus.NOT_FOUND)[404]},
        summary="The certificate of the manager's own authority: compare its fingerprint before you trust it",
    )
    def authority() -> Any:
        certificate = manager.settings.authority_dir / "ca.pem"
        try:
            return PlainTextResponse(certificate.read_text(encoding="ascii"))
        except FileNotFoundError as error:
            raise NotFoundError(
                "the manager answers this machine alone and has no authority - start it with --listen"
            ) from error

    return routes


def identity_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["identity"])
    identity = manager.identity

    @routes.get("/me", response_model=Me, responses=documented(), summary="Who you are with this token")
    async def me(request: Request) -> Any:
        caller = caller_of(request)
        allowed = sorted(scope for scope in caller.scopes if caller.may(scope))
        return {
            "user": caller.user,
            "role": caller.role,
            "teams": sorted(caller.teams),
            "scopes": allowed,
            "expires": caller.expires,
            "token": caller.token or None,
            "signed_in": caller.signed_in,
        }

    @routes.get("/users", response_model=UserList, responses=documented())
    def list_users() -> Any:
        return {"users": [_user(user) for user in identity.users()]}

    @routes.post(
        "/users",
        status_code=HTTPStatus.CREATED,
        response_model=UserView,
        responses=documented(HTTPStatus.CONFLICT),
        summary="Add a user; make a token for them next",
    )
    def add_user(wanted: NewUser, request: Request) -> Any:
        request.state.about = f"user {wanted.name}"
        return _user(identity.add_user(wanted.name, wanted.role, wanted.teams))

    @routes.patch(
        "/users/{name}",
        response_model=UserView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Change a user's role or teams, or shut them out",
    )
    def change_user(name: _OfUser, wanted: UserChange) -> Any:
        changed = identity.change_user(
            name, role=wanted.role, teams=wanted.teams, disabled=wanted.disabled, unbind=wanted.unbind
        )
        return _user(changed)

    @routes.get("/tokens", response_model=TokenList, responses=documented())
    def list_tokens(request: Request, user: Annotated[str | None, Query(max_length=60)] = None) -> Any:
        """Yours; those of others for who may see users."""
        caller = caller_of(request)
        if not caller.may("users:read"):
            user = caller.user
        return {"tokens": [_token(token) for token in identity.tokens(user)]}

    @routes.post(
        "/tokens",
        status_code=HTTPStatus.CREATED,
        response_model=MadeToken,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Make a token: for yourself with at most this one's scopes, for others as an admin",
    )
    def add_token(wanted: NewToken, request: Request) -> Any:
        caller = caller_of(request)
        user = wanted.user or caller.user
        if user != caller.user and not caller.may("users:write"):
            raise ForbiddenError(f"tokens of {user} are made by {user}, or by an admin")
        token, text = identity.add_token(
            user, wanted.name, _within(caller, user, wanted.scopes), wanted.expires_s
        )
        request.state.about = f"token {token.id} of {user}"
        return {**_token(token), "token": text}

    @routes.delete(
        "/tokens/{id}",
        response_model=TokenView,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="Revoke a token; nobody comes in with it from now on",
    )
    def revoke_token(id: _Number, request: Request) -> Any:
        caller = caller_of(request)
        token = identity.token(id)
        if token.user != caller.user and not caller.may("users:write"):
            raise NotFoundError(f"there is no token '{id}' - see 'flops token ls'")
        return _token(identity.revoke(id))

    @routes.get("/audit", response_model=AuditList, responses=documented(), summary="The audit log")
    def audit(
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        user: Annotated[str | None, Query(max_length=60)] = None,
        newest: Annotated[bool, Query(description="The last ones, the newest first")] = False,
    ) -> Any:
        found = manager.audit.entries(after, limit, user=user, newest=newest)
        return {"entries": [_entry(entry) for entry in found]}

    @routes.post(
        "/audit/verify",
        response_model=VerificationView,
        responses=documented(),
        summary="Compute the chain of the audit log anew",
    )
    def verify(wanted: VerificationRequest) -> Any:
        found = manager.audit.verify(wanted.head)
        return {"ok": found.broken_at is None, **vars(found)}

    return routes


def _within(caller: Caller, user: str, scopes: list[str] | None) -> list[str] | None:
    """Nobody passes on more than the token they came with is good for."""
    if scopes is None and user != caller.user:
        return None
    allowed = {scope for scope in caller.scopes if caller.may(scope)}
    if scopes is None:
        return sorted(caller.scopes)
    if user == caller.user and (more := check_scopes(scopes) - allowed):
        raise ForbiddenError(f"this token is not good for {', '.join(sorted(more))} - ask for less")
    return scopes


def _user(user: User) -> dict[str, Any]:
    return {**vars(user), "teams": sorted(user.teams)}


def _token(token: Token) -> dict[str, Any]:
    return {**vars(token), "scopes": sorted(token.scopes)}


def _entry(entry: AuditEntry) -> dict[str, Any]:
    return dict(vars(entry))
