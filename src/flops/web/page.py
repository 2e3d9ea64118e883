"""Rendering: templates, what every page knows, and the way in for whoever is signed in."""

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from flops import __version__
from flops.core.errors import InvalidInputError
from flops.core.ids import project_id
from flops.web import words
from flops.web.call import Api, RefusedError
from flops.web.picture import Pictures
from flops.web.session import CSRF_FIELD, CSRF_HEADER, Codes, check_form, csrf_of, fields_of, token_of

STATIC = Path(__file__).parent / "static"
THEME_COOKIE = "flops-theme"
_LATER = Markup("\x00later\x00")
"""Text from outside cannot be it: `words.harmless` leaves no such characters."""

_SAID = {
    "stopping": "The project is being stopped.",
    "pausing": "The project is being paused; it keeps what it has reached.",
    "resumed": "The project goes on.",
    "extended": "The project trains on.",
    "deployed": "The model is served.",
    "undeployed": "The model is served no longer.",
    "deleted": "The project is forgotten. Registered models stay.",
    "submitted": "The project is submitted. This page follows it.",
    "dropped": "The fragment is deleted.",
    "mocked": "The data set is spread over the sites.",
    "user-added": "The user is added.",
    "user-changed": "The user is changed.",
    "token-revoked": "The token is revoked; whoever used it is locked out from now on.",
}


@dataclass
class House:
    """What lives as long as the application."""

    pictures: Pictures = field(default_factory=Pictures)
    codes: Codes = field(default_factory=Codes)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    api: ASGIApp | None = None


def checked_project(name: str) -> str:
    """Raises: RefusedError: that is no id of a project."""
    try:
        return project_id(name)
    except InvalidInputError as error:
        raise RefusedError(404, "not-found", str(error)) from error


def house_of(request: Request) -> House:
    found = request.app.state.house
    assert isinstance(found, House)
    return found


def api_of(request: Request, token: str) -> Api:
    api = house_of(request).api
    assert api is not None
    return Api(api, token, request)


@dataclass(frozen=True)
class Form:
    """What a form sent; of a repeated name `one` takes the last."""

    fields: list[tuple[str, str]]

    def one(self, name: str) -> str:
        found = [value for key, value in self.fields if key == name]
        return found[-1].strip() if found else ""

    def every(self, name: str) -> list[str]:
        return [value.strip() for key, value in self.fields if key == name and value.strip()]

    def has(self, name: str) -> bool:
        return any(key == name for key, _ in self.fields)


class Visit:
    """One request of somebody who is signed in."""

    def __init__(self, request: Request, token: str, who: Mapping[str, Any], form: Form) -> None:
        self.request = request
        self.token = token
        self.who = who
        self.form = form
        self.api = api_of(request, token)
        self.house = house_of(request)

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    @property
    def path(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.request.path_params.items()}

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        return HTMLResponse(self.render(template, **values), status)

    def page_in_two(
        self, template: str, part: str, look: Awaitable[Mapping[str, Any]], **values: Any
    ) -> Response:
        """A page that is seen before all of it is known: ``part`` follows where ``{{ later }}`` stands.

        Lists of data take a second where many are held; nobody has to look at an empty window meanwhile.
        """
        before, after = self.render(template, later=_LATER, **values).split(_LATER)

        async def pieces() -> AsyncIterator[str]:
            yield before
            try:
                yield self.render(part, **values, **await look)
            except RefusedError as error:
                yield self.render("refused.html", detail=words.clean(error.detail, 2000))
            yield after

        return StreamingResponse(pieces(), media_type="text/html; charset=utf-8")

    def render(self, template: str, **values: Any) -> str:
        return _TEMPLATES.get_template(template).render(**self.known(), **values)

    def known(self) -> dict[str, Any]:
        return _known(self.request) | {
            "who": self.who,
            "csrf": csrf_of(self.token),
            "may": self.may,
        }

    def may(self, scope: str) -> bool:
        """What there is no use in offering is not offered; to refuse it is the API's matter."""
        scopes = self.who.get("scopes")
        return scopes is None or scope in scopes

    def go(self, path: str, said: str = "") -> Response:
        """Look at another page; ``said`` is one of the sentences above."""
        return RedirectResponse(f"{path}{'&' if '?' in path else '?'}said={said}" if said else path, 303)


Handler = Callable[[Visit], Awaitable[Response]]


def signed_in(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """For whoever is signed in; everybody else is asked to. Forms are checked before they are believed."""

    @wraps(handler)
    async def checked(request: Request) -> Response:
        token = token_of(request)
        if not token:
            raise RefusedError(401, "unauthorized", "nobody is signed in")
        form = Form([])
        if request.method not in ("GET", "HEAD"):
            form = Form(await fields_of(request))
            check_form(request, token, request.headers.get(CSRF_HEADER) or form.one(CSRF_FIELD))
        visit = request.state.visit = Visit(request, token, await who_is(request, token), form)
        return await handler(visit)

    return checked


async def who_is(request: Request, token: str) -> Mapping[str, Any]:
    """Raises: RefusedError: the token is nobody's."""
    api = api_of(request, token)
    who = await api.find("me")
    if who is None:  # a manager with one user
        await api.get("projects")
        who = {"user": "admin", "role": "admin"}
    return dict(who)


async def problem_page(request: Request, status: int, detail: str) -> Response:
    """An error as a page; it says what to do, and never fails itself."""
    title = {403: "Not allowed", 404: "Not found", 409: "Not now", 422: "Not possible", 503: "Not available"}
    template = _TEMPLATES.get_template("problem.html")
    values = {"title": title.get(status, "That did not work"), "detail": words.clean(detail, 2000)}
    visit = getattr(request.state, "visit", None)
    known = visit.known() if isinstance(visit, Visit) else _known(request)
    return HTMLResponse(template.render(**known, **values, status=status), status)


def render(request: Request, template: str, **values: Any) -> str:
    """For pages of nobody in particular."""
    return _TEMPLATES.get_template(template).render(**_known(request), **values)


def _known(request: Request) -> dict[str, Any]:
    theme = request.cookies.get(THEME_COOKIE, "")
    return {
        "now": time.time(),
        "here": request.url.path,
        "here_full": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "theme": theme if theme in ("light", "dark") else "",
        "said": _SAID.get(request.query_params.get("said", "")),
        "version": __version__,
    }


def _asset(name: str) -> str:
    return f"/static/{name}?v={_DIGESTS[name]}"


def _time_tag(moment: float | None, form: str = "ago") -> Markup:
    """A time as people say it, with the exact one beside it; the page's script keeps it true."""
    if moment is None or not math.isfinite(moment):
        return escape(words.NOTHING)
    exact = words.machine_time(moment), words.absolute(moment)
    if form == "clock":
        return Markup('<time datetime="{}" title="{}">{}</time>').format(*exact, words.clock(moment))
    return Markup('<time datetime="{}" title="{}" data-ago="{:.1f}">{}</time>').format(
        *exact, moment, words.ago(moment, time.time())
    )


def _since_tag(moment: float | None) -> Markup:
    """How long it lasts by now; ticks."""
    if moment is None:
        return Markup("")
    return Markup('<span data-since="{:.1f}">{}</span>').format(moment, words.duration(time.time() - moment))


def _progress(done: float, total: float, label: str) -> Markup:
    return Markup('<progress max="{:g}" value="{:g}" aria-label="{}"></progress>').format(
        max(total, 1), min(done, total), label
    )


def _link_part(value: object) -> str:
    return quote(str(value), safe="")


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        finalize=words.harmless,
    )
    environment.filters.update(
        {
            name: getattr(words, name)
            for name in (
                "duration",
                "size",
                "number",
                "percent",
                "metric",
                "absolute",
                "plain",
                "clean",
                "plural",
            )
        }
    )
    environment.filters["part"] = _link_part
    environment.globals.update(
        asset=_asset, when=_time_tag, since=_since_tag, progress=_progress, nothing=words.NOTHING
    )
    return environment


_DIGESTS = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    for path in STATIC.iterdir()
    if path.is_file()
}
_TEMPLATES = _templates()
