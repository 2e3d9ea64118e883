"""Who is signed in, and whether a form came from our own page.

The session is the person's API token in a cookie that scripts cannot read and that no other site can make a
browser send. Cookies do not know ports, so its name carries ours: managers on one host do not sign each
other's users out. A form is taken only from our own origin, and with a value that can be made
only from the token.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

CSRF_FIELD = "csrf"
CSRF_HEADER = "x-csrf"
_CODE_LIFETIME_S = 120.0
_MOST_CODES = 100
_SIGN_IN_S = 600
_MOST_FIELDS = 400


def _cookie(request: Request) -> str:
    port = request.url.port or (443 if request.url.scheme == "https" else 80)
    prefix = "__Host-" if request.url.scheme == "https" else ""
    return f"{prefix}flops-{port}"


def token_of(request: Request) -> str:
    """The token of whoever is signed in; empty: nobody."""
    return request.cookies.get(_cookie(request), "")


def sign_in(request: Request, response: Response, token: str) -> None:
    response.set_cookie(
        _cookie(request),
        token,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def sign_out(request: Request, response: Response) -> None:
    response.delete_cookie(
        _cookie(request), path="/", httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )


def keep_sign_in(request: Request, response: Response, state: str, secret: str, after: str) -> None:
    """For the time at the issuer: it comes back with a visit that another site began (``lax``)."""
    response.set_cookie(
        f"{_cookie(request)}-oidc",
        f"{state}.{secret}.{quote(after, safe='')}",
        max_age=_SIGN_IN_S,
        path="/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )


def kept_sign_in(request: Request) -> tuple[str, str, str]:
    """State, secret, and where to go after it; empty where none is under way."""
    state, _, rest = request.cookies.get(f"{_cookie(request)}-oidc", "").partition(".")
    secret, _, after = rest.partition(".")
    return state[:100], secret[:100], unquote(after)


def forget_sign_in(request: Request, response: Response) -> None:
    response.delete_cookie(
        f"{_cookie(request)}-oidc",
        path="/",
        httponly=True,
        samesite="lax",
        secure=request.url.scheme == "https",
    )


def is_token(text: str) -> bool:
    """Whether a text may be put into a cookie and a header: no spaces, quotes or line ends."""
    return 0 < len(text) <= 4096 and all(33 <= ord(c) < 127 and c not in '",;\\' for c in text)


def csrf_of(token: str) -> str:
    """What our own forms carry: made from the token, and telling nothing of it."""
    return hmac.new(token.encode(), b"flops web form", hashlib.sha256).hexdigest()


def check_origin(request: Request) -> None:
    """Raises: HTTPException: another site, or another port of this host, sent the request."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    own = (request.url.scheme, request.headers.get("host", ""))
    if (site is not None and site != "same-origin") or (
        origin is not None and (urlsplit(origin).scheme, urlsplit(origin).netloc) != own
    ):
        raise HTTPException(
            403, "the form came from another site - open the page itself and send it from there"
        )


def check_form(request: Request, token: str, given: str) -> None:
    """Raises: HTTPException: the form is not one of ours, or of another session."""
    check_origin(request)
    if not hmac.compare_digest(given.encode(), csrf_of(token).encode()):
        raise HTTPException(403, "the form is of another session - reload the page and send it again")


async def fields_of(request: Request) -> list[tuple[str, str]]:
    """The fields of a form, in order."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, f"a form of type '{kind[:60]}' is not read here - send it from the page")
    try:
        text = (await request.body()).decode()
        return parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict")
    except ValueError as error:
        raise HTTPException(400, f"the form cannot be read ({error}) - send it from the page") from error


def local_path(text: str) -> str:
    """Where to go after signing in: a path of ours, or the first page."""
    ours = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable()
    return text if ours and "\\" not in text else "/"


class Codes:
    """Codes that stand for a token once, for two minutes: what `flops web` puts into an address."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: dict[str, tuple[str, float]] = {}

    def issue(self, token: str) -> str:
        while len(self._known) >= _MOST_CODES:
            del self._known[next(iter(self._known))]
        code = secrets.token_urlsafe(24)
        self._known[code] = (token, self._now() + _CODE_LIFETIME_S)
        return code

    def redeem(self, code: str) -> str | None:
        """The token; None: the code is unknown, used or too old."""
        token, until = self._known.pop(code, ("", 0.0))
        return token if token and self._now() < until else None
