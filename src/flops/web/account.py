"""Signing in and out, and the theme."""

import asyncio
from http import HTTPStatus
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from flops.web.call import RefusedError
from flops.web.page import THEME_COOKIE, Form, Visit, house_of, render, signed_in, who_is
from flops.web.session import check_origin, fields_of, is_token, local_path, sign_in, sign_out, token_of

_A_YEAR_S = 365 * 24 * 3600
_PAUSE_AFTER_REFUSAL_S = 0.3


def routes() -> list[Route]:
    return [
        Route("/login", _form, methods=["GET"]),
        Route("/login", _check, methods=["POST"]),
        Route("/login/codes", _issue, methods=["POST"]),
        Route("/login/state", _state, methods=["GET"]),
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
    return HTMLResponse(_page(request, local_path(request.query_params.get("next", "/"))))


def _page(request: Request, after: str, problem: str = "") -> str:
    return render(request, "login.html", after=after, problem=problem)


async def _check(request: Request) -> Response:
    check_origin(request)
    form = Form(await fields_of(request))
    after = local_path(form.one("next"))
    code = form.one("code")
    token = (house_of(request).codes.redeem(code) or "") if code else form.one("token")
    if code and not token:
        problem = "This address was used before or is too old - run 'flops web' again, or give a token."
        return HTMLResponse(_page(request, after, problem), 401)
    if not is_token(token):
        return HTMLResponse(_page(request, after, "That is no token - paste it whole, as one line."), 401)
    try:
        await who_is(request, token)
    except RefusedError as error:
        if error.status not in (401, 403, 429):
            raise
        await asyncio.sleep(_PAUSE_AFTER_REFUSAL_S)
        detail = error.detail if error.status == 429 else "The token is wrong, expired or revoked."
        return HTMLResponse(_page(request, after, detail), error.status)
    answer = RedirectResponse(after, 303)
    sign_in(request, answer, token)
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
