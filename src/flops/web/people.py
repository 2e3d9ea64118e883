"""Users, tokens and the audit log."""

from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flops.web.call import RefusedError
from flops.web.page import Visit, signed_in

_ROLES = ("engineer", "data-owner", "auditor", "admin")
_EXPIRIES = (("86400", "in a day"), ("2592000", "in 30 days"), ("31536000", "in a year"), ("", "never"))
_PAGE = 100


def routes() -> list[Route]:
    return [
        Route("/users", _page, methods=["GET"]),
        Route("/users", _add, methods=["POST"]),
        Route("/users/{name}", _change, methods=["POST"]),
        Route("/tokens", _make, methods=["POST"]),
        Route("/tokens/{token}/revoke", _revoke, methods=["POST"]),
        Route("/audit", _audit, methods=["GET"]),
        Route("/audit/verify", _verify, methods=["POST"]),
    ]


@signed_in
async def _page(visit: Visit) -> Response:
    return await _show(visit)


async def _show(visit: Visit, made: Any = None, problem: str = "", status: int = 200) -> Response:
    users = await visit.api.find("users")
    tokens = await visit.api.find("tokens")
    return visit.page(
        "users.html",
        status=status,
        users=users["users"] if users else None,
        tokens=tokens["tokens"] if tokens else None,
        made=made,
        problem=problem,
        roles=_ROLES,
        expiries=_EXPIRIES,
    )


@signed_in
async def _add(visit: Visit) -> Response:
    teams = [team.strip() for team in visit.form.one("teams").split(",") if team.strip()]
    body = {"name": visit.form.one("name"), "role": visit.form.one("role"), "teams": teams}
    try:
        await visit.api.send("POST", "users", body=body)
    except RefusedError as error:
        return await _told(visit, error)
    return visit.go("/users", "user-added")


@signed_in
async def _change(visit: Visit) -> Response:
    body: dict[str, Any] = {}
    if visit.form.one("role"):
        body["role"] = visit.form.one("role")
    if visit.form.one("disabled"):
        body["disabled"] = visit.form.one("disabled") == "yes"
    try:
        await visit.api.send("PATCH", "users", visit.path["name"], body=body)
    except RefusedError as error:
        return await _told(visit, error)
    return visit.go("/users", "user-changed")


@signed_in
async def _make(visit: Visit) -> Response:
    body: dict[str, Any] = {"name": visit.form.one("name")}
    if user := visit.form.one("user"):
        body["user"] = user
    expires = visit.form.one("expires_s")
    if expires in dict(_EXPIRIES) and expires:
        body["expires_s"] = int(expires)
    if scopes := visit.form.every("scopes"):
        body["scopes"] = scopes
    try:
        made = await visit.api.send("POST", "tokens", body=body)
    except RefusedError as error:
        return await _told(visit, error)
    # Shown in the answer itself, once: it is nowhere to be asked for again, and in no address.
    return await _show(visit, made=made)


@signed_in
async def _revoke(visit: Visit) -> Response:
    await visit.api.send("DELETE", "tokens", visit.path["token"])
    return visit.go("/users", "token-revoked")


async def _told(visit: Visit, error: RefusedError) -> Response:
    if error.status not in (403, 404, 409, 422):
        raise error
    return await _show(visit, problem=error.detail, status=error.status)


@signed_in
async def _audit(visit: Visit) -> Response:
    return await _log(visit)


@signed_in
async def _verify(visit: Visit) -> Response:
    return await _log(visit, await visit.api.send("POST", "audit", "verify", body={}))


async def _log(visit: Visit, verified: Any = None) -> Response:
    before = visit.query.get("before", "")
    user = visit.query.get("user", "")
    params: dict[str, Any] = {"limit": _PAGE, "newest": "true", "user": user or None}
    if before.isascii() and before.isdecimal() and len(before) < 16:
        first = max(0, int(before) - _PAGE - 1)
        params = {"limit": int(before) - first - 1, "after": first, "user": user or None}
    entries: list[Any] | None = []
    if params["limit"]:
        found = await visit.api.find("audit", **params)
        entries = sorted(found["entries"], key=lambda one: -one["seq"]) if found is not None else None
    return visit.page("audit.html", entries=entries, verified=verified, user=user, paged=bool(before))
