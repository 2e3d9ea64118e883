"""The application: its routes, what every answer carries, and the way errors look."""

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.web import account, compare, data, models, new, people, project, projects
from flops.web.call import RefusedError
from flops.web.page import STATIC, House, problem_page
from flops.web.session import token_of

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_A_YEAR = "public, max-age=31536000, immutable"


class Web:
    """The GUI beside one API; `close` ends the streams of open pages, so that nobody waits for them."""

    def __init__(self) -> None:
        self._house = House()

    def beside(self, api: ASGIApp) -> ASGIApp:
        """The application for every path that is not the API's.

        Args:
            api: what serves ``/v1``; called within the process.
        """
        self._house.api = api
        modules = (account, projects, project, new, models, data, compare, people)
        app = Starlette(
            routes=[
                *(route for module in modules for route in module.routes()),
                Mount("/static", StaticFiles(directory=STATIC), name="static"),
            ],
            exception_handlers={
                HTTPException: _of_http,
                RefusedError: _of_api,
                Exception: _of_anything,
            },
        )
        app.state.house = self._house
        return _Guarded(app)

    def token_of(self, request: Request) -> str:
        """The token of whoever is signed in; empty: nobody."""
        return token_of(request)

    def to_login(self, request: Request) -> Response:
        """Ask to sign in, then come back."""
        return _guard(account.to_login(request))

    async def problem(self, request: Request, status: int, detail: str) -> Response:
        """Why there is no other page."""
        return _guard(await problem_page(request, status, detail))

    def close(self) -> None:
        """Call it in the event loop that serves the pages."""
        self._house.closing.set()


def _guard(answer: Response) -> Response:
    answer.headers.update({**_HEADERS, "Cache-Control": "no-store"})
    return answer


class _Guarded:
    """Puts on every answer what a browser has to know to be careful."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        is_static = scope["path"].startswith("/static/")

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if is_static and message["status"] == 200 and b"v=" in scope["query_string"]:
                    headers["Cache-Control"] = _A_YEAR
                else:
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, guarded)


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404:
        detail = f"there is no page '{request.url.path[:120]}' - start from the projects"
    return await problem_page(request, error.status_code, detail)


async def _of_api(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    if error.status == 401:
        return account.to_login(request)
    return await problem_page(request, error.status, error.detail)


async def _of_anything(request: Request, error: Exception) -> Response:
    detail = f"this page could not be made ({type(error).__name__}) - see the manager's log, and report it"
    return await problem_page(request, 500, detail)
