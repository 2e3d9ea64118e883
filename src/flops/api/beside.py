"""What is served beside the REST API under the same address: the GUI, of which this package knows nothing."""

from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from flops.api.access import LimitedBody
from flops.tracking import GUI_PREFIX

_MAX_FORM_BYTES = 1 << 20
_OF_API = ("/v1", "/api", "/internal", GUI_PREFIX)


class Pages(Protocol):
    """A GUI."""

    def beside(self, api: ASGIApp) -> ASGIApp:
        """The application for all paths that are not the API's; it calls ``api`` within the process."""

    def token_of(self, request: Request) -> str:
        """The token of whoever is signed in with a browser; empty: nobody."""

    def to_login(self, request: Request) -> Response:
        """Ask whoever opens a page to sign in, and to come back."""

    async def problem(self, request: Request, status: int, detail: str) -> Response:
        """A page that says why there is no other."""

    def close(self) -> None:
        """End the streams of open pages; called in the event loop that serves them."""


class Beside:
    """Gives paths of the API to it, and all others to the pages.

    It stands behind the check of the manager's names and before the audit: what somebody does on a page is
    audited as the request to the API that the page makes of it.
    """

    def __init__(self, app: ASGIApp, pages: Pages) -> None:
        self._app = app
        self._pages = LimitedBody(pages.beside(app), limit_bytes=lambda _: _MAX_FORM_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        mine = scope["type"] != "http" or any(path == own or path.startswith(f"{own}/") for own in _OF_API)
        await (self._app if mine else self._pages)(scope, receive, send)
