"""Signing in, with a token or with an issuer, and out; the theme.

Whoever goes to the issuer takes a cookie along, with what the manager gave to finish the sign-in: only the
browser that began it comes in. Ways to and from other sites are pages that go on by themselves: a browser
follows no redirect of a form to another site where forms are ours alone, and keeps the session's cookie back
from a visit that another site began.
"""

import asyncio
import re
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from flops.web.call import RefusedError
from flops.web.page import THEME_COOKIE, Form, Visit, api_of, house_of, render, signed_in, who_is
from flops.web.session import (
    check_origin,
    fields_of,
    forget_sign_in,
    is_token,
    keep_sign_in,
    kept_sign_in,
    local_path,
    sign_in,
    sign_out,
    token_of,
)

_A_YEAR_S = 365 * 24 * 3600
_PAUSE_AFTER_REFUSAL_S = 0.3
_CALLBACK = "/login/oidc"
_ERROR_CODE = re.compile(r"[a-z_]{1,40}")


def routes() -> list[Route]:
    return [
        Route("/login", _form, methods=["GET"]),
        Route("/login", _check, methods=["POST"]),
        Route("/login/codes", _issue, methods=["POST"]),
        Route("/login/state", _state, methods=["GET"]),
        Route(_CALLBACK, _go, methods=["POST"]),
        Route(_CALLBACK, _come_back, methods=["GET"]),
        Route("/logout", _leave, methods=["POST"]),
        Route("/theme", _theme, methods=["POST"]),
    ]


def to_login(request: Request) -> Response:
    """Ask to sign in, then come back; a form that was being sent is not repeated."""
    if request.headers.get("accept", "").startswith("text/event-stream"):
        return Response(status_code=HTTPStatus.UNAUTHORIZED)
    path = request.url.path if request.method == "GET" else "/"
    if request.url.query and request.method == "GET":
        path += f"?{request.url.query}"
    answer = RedirectResponse("/login" if path == "/" else f"/login?next={quote(path, safe='')}", 303)
    if token_of(request):
        sign_out(request, answer)
    return answer


async def _form(request: Request) -> Response:
    return await _page(request, local_path(request.query_params.get("next", "/")))


async def _page(request: Request, after: str, problem: str = "", status: int = 200) -> Response:
    try:
        issuer = (await api_of(request, "").get("oidc")).get("issuer")
    except RefusedError:
        issuer = None
    return HTMLResponse(render(request, "login.html", after=after, problem=problem, issuer=issuer), status)


async def _check(request: Request) -> Response:
    check_origin(request)
    form = Form(await fields_of(request))
    after = local_path(form.one("next"))
    code = form.one("code")
    token = (house_of(request).codes.redeem(code) or "") if code else form.one("token")
    if code and not token:
        problem = "This address was used before or is too old - run 'flops web' again, or give a token."
        return await _page(request, after, problem, 401)
    if not is_token(token):
        return await _page(request, after, "That is no token - paste it whole, as one line.", 401)
    try:
        await who_is(request, token)
    except RefusedError as error:
        if error.status not in (401, 403, 429):
            raise
        await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
        detail = error.detail if error.status == 429 else "The token is wrong, expired or revoked."
        return await _page(request, after, detail, error.status)
    answer = RedirectResponse(after, 303)
    sign_in(request, answer, token)
    return answer


async def _go(request: Request) -> Response:
    """To the issuer."""
    check_origin(request)
    after = local_path(Form(await fields_of(request)).one("next"))
    here = f"{request.url.scheme}://{request.headers.get('host', '')}{_CALLBACK}"
    try:
        begun = await api_of(request, "").send("POST", "oidc", "begin", body={"redirect_uri": here})
    except RefusedError as error:
        return await _page(request, after, error.detail, error.status)
    answer = HTMLResponse(render(request, "going.html", to=begun["url"], words="Going to sign in"))
    keep_sign_in(request, answer, begun["state"], begun["secret"], after)
    return answer


async def _come_back(request: Request) -> Response:
    """From the issuer, with a code or with a refusal."""
    query = request.query_params
    state, secret, after = kept_sign_in(request)
    after = local_path(after)
    if not state or query.get("state") != state:
        words = "No sign-in was begun in this browser, or another one since - begin again."
        return await _page(request, after, words, 400)
    try:
        if "error" in query:
            code = query["error"]
            shown = f" ({code})" if _ERROR_CODE.fullmatch(code) else ""
            raise RefusedError(403, "forbidden", f"There you were not signed in{shown} - try again.")
        body = {"state": state, "secret": secret, "code": query.get("code", ""), "iss": query.get("iss")}
        made = await api_of(request, "").send("POST", "oidc", "finish", body=body)
    except RefusedError as error:
        answer = await _page(request, after, error.detail, error.status)
    else:
        answer = HTMLResponse(render(request, "going.html", to=after, words="You are signed in"))
        sign_in(request, answer, made["token"])
    forget_sign_in(request, answer)
    return answer


async def _issue(request: Request) -> Response:
    """For `flops web`: a code that stands for the caller's token, once."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not is_token(token):
        raise HTTPException(401, "the request brings no token - send 'Authorization: Bearer TOKEN'")
    try:
        await who_is(request, token)
    except RefusedError as error:
        return JSONResponse({"detail": error.detail, "code": error.code}, error.status)
    return JSONResponse({"code": house_of(request).codes.issue(token)})


async def _state(request: Request) -> Response:
    """Whether somebody is signed in: cookies do not come along when a link of another site is followed."""
    token = token_of(request)
    try:
        known = bool(token) and bool(await who_is(request, token))
    except RefusedError:
        known = False
    return JSONResponse({"signed_in": known})


@signed_in
async def _leave(visit: Visit) -> Response:
    if visit.who.get("signed_in"):  # others know the token no more than the person does
        with suppress(RefusedError):
            await visit.api.send("DELETE", "tokens", str(visit.who["token"]))
    answer = RedirectResponse("/login", 303)
    sign_out(visit.request, answer)
    return answer


async def _theme(request: Request) -> Response:
    check_origin(request)
    form = Form(await fields_of(request))
    answer = RedirectResponse(local_path(form.one("next")), 303)
    theme = form.one("theme")
    if theme in ("light", "dark"):
        answer.set_cookie(THEME_COOKIE, theme, max_age=_A_YEAR_S, path="/", samesite="strict", httponly=True)
    else:
        answer.delete_cookie(THEME_COOKIE, path="/")
    return answer
