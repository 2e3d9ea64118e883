"""Who is asking an image registry: what to send as authorization, and tokens from the service that it names.

Safe for several threads; a token that several need is fetched once.

Source:
    Docker registry token authentication, and RFC 9110 section 11 for the Basic scheme.
"""

import base64
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from flops.core.errors import FailedError, UnauthorizedError
from flops.images.credentials import Credentials

Scopes = tuple[str, ...]
"""Rights that a token must give, such as ``repository:a/b:pull,push``."""

_TOKEN_LIFE_S = 60.0
_TOKEN_MARGIN_S = 10.0
_CHALLENGE = re.compile(r"\s*(Bearer|Basic)\b(.*)", re.IGNORECASE | re.DOTALL)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_TOKEN = re.compile(r"[\x21-\x7e]+")


def pulling(repository: str) -> Scopes:
    """The right to read a repository."""
    return (f"repository:{repository}:pull",)


def pushing(repository: str) -> Scopes:
    """The right to write into a repository."""
    return (f"repository:{repository}:pull,push",)


@dataclass(frozen=True)
class _TokenService:
    realm: str
    service: str


class Access:
    """What is known of a registry's wishes, and the tokens in use."""

    def __init__(self, host: str, credentials: Credentials | None, plain: bool) -> None:
        """``plain``: the registry is spoken to without TLS, and its token service may be."""
        self._host = host
        self._credentials = credentials
        self._plain = plain
        self._lock = threading.Lock()
        self._wants_basic = False
        self._token_service: _TokenService | None = None
        self._tokens: dict[Scopes, tuple[str, float]] = {}

    def authorization(self, scopes: Scopes, ask: Callable[[httpx.Request], bytes]) -> str | None:
        """What to send for these rights, as far as the registry's wishes are known; None: nothing.

        Args:
            ask: sends a request to the token service; gives the body of a good answer.
        Raises:
            UnauthorizedError: the token service refuses.
            FailedError: it gives no token.
        """
        known = self._credentials
        if known is not None and known.registry_token:
            return f"Bearer {known.registry_token}"
        with self._lock:
            if self._wants_basic:
                return _basic(known) if known is not None else None
            if self._token_service is None:
                return None
            token, until = self._tokens.get(scopes, ("", 0.0))
            if time.monotonic() >= until:
                token, life_s = self._token(ask(_request(self._token_service, scopes, known)))
                self._tokens[scopes] = (token, time.monotonic() + life_s)
            return f"Bearer {token}"

    def learn(self, response: httpx.Response, scopes: Scopes, tried: str | None) -> bool:
        """Take in what an answer 401 asks for; False: there is nothing more to offer than was tried.

        Raises:
            FailedError: the registry names a token service that must not be told a password.
        """
        known = self._credentials
        if known is not None and known.registry_token:
            return False
        for header in response.headers.get_list("www-authenticate"):
            match = _CHALLENGE.match(header)
            if match is None:
                continue
            if match[1].lower() == "basic":
                if known is None or tried == _basic(known):
                    return False
                with self._lock:
                    self._wants_basic = True
                return True
            parameters = {key.lower(): value for key, value in _PARAMETER.findall(match[2])}
            realm = self._checked(parameters.get("realm", ""))
            with self._lock:
                self._token_service = _TokenService(realm, parameters.get("service", ""))
                if tried is not None and tried == f"Bearer {self._tokens.get(scopes, ('',))[0]}":
                    del self._tokens[scopes]
            return True
        return False

    def refused(self, status: int, said: str, subject: str) -> UnauthorizedError:
        """The error for an answer 401 or 403 to what we had to offer."""
        words, known = f"image registry {self._host}", self._credentials
        if known is None:
            return UnauthorizedError(
                f"{words} wants credentials for {subject}{said}, and there are none - run 'docker login "
                f"{self._host}' or name a file with them in REGISTRY_AUTH_FILE, and check the name"
            )
        who = f"user '{known.username}'" if known.username else "its token"
        if status == 401 and self._token_service is None:
            return UnauthorizedError(
                f"{words} refuses the credentials of {who}, from {known.source}, asked for {subject}{said} - "
                f"run 'docker login {self._host}' again"
            )
        return UnauthorizedError(
            f"{words} denies {who}, from {known.source}, {subject}{said} - "
            "ask its owner for the right, or use another repository"
        )

    def refused_token(self, said: str, subject: str) -> UnauthorizedError:
        """The error for a token service that refuses."""
        known = self._credentials
        if known is None:
            return self.refused(401, said, subject)
        who = f"user '{known.username}'" if known.username else "the token"
        return UnauthorizedError(
            f"image registry {self._host} refuses the credentials of {who}, from {known.source}, "
            f"asked for {subject}{said} - run 'docker login {self._host}' again"
        )

    def _checked(self, realm: str) -> str:
        """The address of the token service, which is told the user's password."""
        try:
            url = httpx.URL(realm)
        except httpx.InvalidURL:
            url = httpx.URL("")
        safe = url.scheme == "https" or (url.scheme == "http" and self._plain)
        if not safe or not url.host:
            raise FailedError(
                f"image registry {self._host} names '{realm[:100]}' as its token service, which is not fit "
                "to be told a password - look at its configuration"
            )
        return realm

    def _token(self, body: bytes) -> tuple[str, float]:
        try:
            document = json.loads(body)
            token = document.get("token") or document["access_token"]
            life_s = float(document.get("expires_in") or _TOKEN_LIFE_S)
            if not isinstance(token, str) or not _TOKEN.fullmatch(token):
                raise ValueError("no token")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FailedError(
                f"the token service of image registry {self._host} gave no token - look at its log"
            ) from error
        return token, max(1.0, min(life_s, 3600.0) - _TOKEN_MARGIN_S)


def _request(service: _TokenService, scopes: Scopes, known: Credentials | None) -> httpx.Request:
    url, headers = httpx.URL(service.realm), {"Accept": "application/json", "Accept-Encoding": "identity"}
    if known is not None and known.identity_token:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": known.identity_token,
            "service": service.service,
            "client_id": "flops",
            "scope": " ".join(scopes),
        }
        return httpx.Request("POST", url, headers=headers, data=form)
    if known is not None:
        headers["Authorization"] = _basic(known)
    asked: dict[str, str | list[str]] = {"scope": list(scopes)} if scopes else {}
    if service.service:
        asked["service"] = service.service
    return httpx.Request("GET", url.copy_merge_params(asked), headers=headers)


def _basic(known: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{known.username}:{known.password}".encode()).decode()
