"""Requests to one image registry: redirects, time limits, patience, and failures in our words.

Credentials go to the registry and to the token service that it names, never anywhere that a redirect or an
upload location points to. HTTPS, except to this machine or where the caller says so; nothing leads from HTTPS
down to HTTP. What is read into memory is bounded. Safe for several threads.
"""

import email.utils
import functools
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from flops.core.disk import DiskFullError
from flops.core.errors import (
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.images.credentials import Credentials
from flops.images.references import PUBLIC_HUB, check_host, is_loopback
from flops.images.registry_access import Access, Scopes

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Between attempts of which none got further than those before."""

Content = Callable[[], Iterable[bytes]]
"""Gives a body's pieces, from the start each time that it is called."""
Sleep = Callable[[float], None]

SILENCE_S = 60.0
"""How long a registry may say nothing."""

_HUB_HOST = "registry-1.docker.io"
_CONNECT_S = 10.0
_DOCUMENT_S = 120.0
_SLOWEST_BYTES_PER_S = 20_000
_MAX_RETRY_AFTER_S = 30.0
_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 256 << 10
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# docker-registry gives some failures of its file system as numbers: ENOSPC, EDQUOT.
_FULL = re.compile(
    rb'no space left|disk quota exceeded|insufficient storage|"Err": ?(28|122)\b', re.IGNORECASE
)


class TryAgainError(UnavailableError):
    """An attempt failed in a way that may pass.

    Attributes:
        after_s: how long the registry asks to wait; 0: not said.
    """

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Patience:
    """How often something is tried again: pauses that grow, begun anew with every progress."""

    def __init__(self, pauses_s: Sequence[float], sleep: Sleep) -> None:
        self._pauses_s = pauses_s
        self._sleep = sleep
        self._failed = 0

    def wait(self, error: TryAgainError) -> None:
        """Pause before the next attempt; raises ``error`` when there were enough."""
        if self._failed >= len(self._pauses_s):
            raise error
        self._sleep(max(self._pauses_s[self._failed], error.after_s))
        self._failed += 1

    def progressed(self) -> None:
        """The last attempt got further than any before it."""
        self._failed = 0


@dataclass(frozen=True)
class Question:
    """A request, and what people are told that it is about."""

    method: str
    url: httpx.URL
    subject: str
    """Such as ``image a/b:1``."""
    scopes: Scopes = ()
    headers: Mapping[str, str] | None = None
    content: Content | None = None
    size: int = 0
    """Of the content."""
    accepted: frozenset[int] = frozenset()
    """Statuses beside 2xx that are answers and no errors."""
    silence_s: float | None = None
    """How long the answer may take; None: as long as usual."""


@dataclass(frozen=True)
class Answer:
    """An answer whose body fits into memory."""

    status: int
    headers: httpx.Headers
    content: bytes
    url: httpx.URL


class Connection:
    """Connections to one registry, kept open between requests; close it in the end."""

    def __init__(
        self,
        host: str,
        credentials: Credentials | None = None,
        *,
        ca: Path | None = None,
        insecure: bool | None = None,
        silence_s: float = SILENCE_S,
        pauses_s: Sequence[float] = PAUSES_S,
        sleep: Sleep = time.sleep,
    ) -> None:
        self.host = check_host(host)
        self.words = f"image registry {host}"
        plain = is_loopback(host) and ca is None if insecure is None else insecure
        self._access = Access(host, credentials, plain)
        api_host = _HUB_HOST if host == PUBLIC_HUB else host
        self._root = httpx.URL(f"{'http' if plain else 'https'}://{api_host}/v2/")
        self._silence_s = silence_s
        self._pauses_s = pauses_s
        self._sleep = sleep
        self._trust = _trust(ca) if ca is not None else None
        self._trusts_environment = not is_loopback(host)
        self._lock = threading.Lock()
        self._clients: dict[str, httpx.Client] = {}

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()

    def url(self, path: str) -> httpx.URL:
        """An address below ``/v2/``."""
        return self._root.join(path)

    def location(self, answer: Answer, subject: str) -> httpx.URL:
        """Where an answer's Location header points to.

        Raises:
            FailedError: it lacks one, or it would lead away from HTTPS.
        """
        return self._next(answer.url, answer.headers.get("location", ""), subject)

    def patience(self) -> Patience:
        """For work of several requests that is to go on after a failure."""
        return Patience(self._pauses_s, self._sleep)

    def request(self, question: Question, limit_bytes: int = _MAX_ERROR_BYTES) -> Answer:
        """Ask, again if need be, and read the answer; one longer than ``limit_bytes`` is an error.

        Raises:
            UnavailableError: not within our patience. Others: see `refusal`.
        """
        patience = self.patience()
        while True:
            try:
                return self.attempt(question, limit_bytes)
            except TryAgainError as error:
                patience.wait(error)

    def attempt(self, question: Question, limit_bytes: int = _MAX_ERROR_BYTES) -> Answer:
        """As `request`, once.

        Raises:
            TryAgainError: it may work the next time. Others: see `refusal`.
        """
        with self.stream(question) as response:
            body = b""
            if question.method != "HEAD":
                body = _read(response, limit_bytes, f"what {self.words} says of {question.subject}")
            return Answer(response.status_code, response.headers, body, response.request.url)

    @contextmanager
    def stream(self, question: Question) -> Iterator[httpx.Response]:
        """One attempt, whose answer the caller reads with `pieces`.

        Raises:
            TryAgainError, FailedError: the registry cannot be reached or understood. Others: see `refusal`.
        """
        with self._translated(question.subject):
            response = self._authorized(question)
            try:
                if not response.is_success and response.status_code not in question.accepted:
                    body = _read(response, _MAX_ERROR_BYTES, question.subject, cut=True)
                    raise self.refusal(response.status_code, response.headers, body, question.subject)
                yield response
            finally:
                response.close()

    def refusal(self, status: int, headers: httpx.Headers, body: bytes, subject: str) -> FlopsError:
        """The error for an answer that is none.

        Returns:
            DiskFullError (the registry has no space), TryAgainError (busy, or failing just now),
            UnauthorizedError (unknown, or not allowed), NotFoundError, FailedError (anything else).
        """
        said = reasons(body)
        if status == 507 or _FULL.search(body):
            return DiskFullError(
                f"no space is left in {self.words}: {subject} waits - free some there and try again, "
                "what has arrived is not sent again"
            )
        if status in (401, 403) or "DENIED" in said:
            return self._access.refused(status, said, subject)
        if status in _BUSY:
            return TryAgainError(
                f"{self.words} answers {status}{said}, asked for {subject} - look at its log, then try again",
                _retry_after(headers.get("retry-after", "")),
            )
        if status == 404:
            return NotFoundError(f"{subject} is not in {self.words}{said} - check the name")
        if status == 413:
            return FailedError(
                f"{self.words}, or a proxy before it, takes no request as large as {subject} needs{said} - "
                "raise its limit"
            )
        return FailedError(f"{self.words} answers {status}{said}, asked for {subject} - look at its log")

    def _authorized(self, question: Question) -> httpx.Response:
        """Send, with what the registry is known to want; if it wants something else, once more."""
        ours = self._is_registry(question.url)
        tried = self._access.authorization(question.scopes, self._ask_token_service) if ours else None
        response = self._sent(question, tried)
        if response.status_code != 401 or not self._is_registry(response.request.url):
            return response
        try:
            if not ours or not self._access.learn(response, question.scopes, tried):
                return response
        except BaseException:
            response.close()
            raise
        response.close()
        return self._sent(question, self._access.authorization(question.scopes, self._ask_token_service))

    def _sent(self, question: Question, authorization: str | None) -> httpx.Response:
        """Send, and follow the redirects of what only reads."""
        url, headers = question.url, dict(question.headers or {})
        if question.method in ("POST", "PUT", "PATCH"):
            headers["Content-Length"] = str(question.size)
        for _ in range(_MAX_REDIRECTS + 1):
            own = {"Authorization": authorization} if authorization and self._is_registry(url) else {}
            client = self._client(url.scheme)
            request = client.build_request(
                question.method,
                url,
                headers={**headers, **own},
                content=question.content() if question.content is not None else None,
                timeout=httpx.Timeout(question.silence_s or self._silence_s, connect=_CONNECT_S),
            )
            response = client.send(request, stream=True)
            if response.status_code not in _REDIRECTS or question.method not in ("GET", "HEAD"):
                return response
            response.close()
            url = self._next(url, response.headers.get("location", ""), question.subject)
        raise FailedError(
            f"{self.words} redirects {question.subject} again and again - look at its configuration"
        )

    def _ask_token_service(self, request: httpx.Request) -> bytes:
        subject = "a token"
        request.extensions["timeout"] = httpx.Timeout(self._silence_s, connect=_CONNECT_S).as_dict()
        with self._translated(subject):
            response = self._client(request.url.scheme).send(request, stream=True)
            try:
                body = _read(response, _MAX_TOKEN_BYTES, subject)
            finally:
                response.close()
        if response.status_code in (401, 403):
            raise self._access.refused_token(reasons(body), subject)
        if not response.is_success:
            raise self.refusal(response.status_code, response.headers, body, subject)
        return body

    def _next(self, url: httpx.URL, location: str, subject: str) -> httpx.URL:
        """An address that the registry gave, if we may go there."""
        try:
            target = url.join(location) if location else None
        except (httpx.InvalidURL, ValueError):
            target = None
        if target is None or target.scheme not in ("http", "https") or not target.host:
            raise FailedError(
                f"{self.words} gives no usable address for {subject} - look at its configuration"
            )
        if url.scheme == "https" and target.scheme == "http":
            # A registry behind a proxy that ends TLS, and not told so, names itself with http.
            if target.host != url.host or target.port not in (None, 80, url.port):
                raise FailedError(
                    f"{self.words} sends {subject} to {target.host} over plain HTTP, which is refused - "
                    "look at its configuration"
                )
            target = target.copy_with(scheme="https", port=url.port)
        return target

    def _client(self, scheme: str) -> httpx.Client:
        """For one scheme; to read which authorities a machine trusts takes 0.1 s, and loopback needs none."""
        with self._lock:
            if scheme not in self._clients:
                trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
                if scheme == "https" or self._trusts_environment:  # a proxy may want TLS
                    trust = self._trust or _machines_trust()
                self._clients[scheme] = httpx.Client(
                    verify=trust,
                    limits=httpx.Limits(
                        max_connections=16, max_keepalive_connections=8, keepalive_expiry=20.0
                    ),
                    follow_redirects=False,
                    trust_env=self._trusts_environment,
                    headers={"Accept-Encoding": "identity", "User-Agent": "flops"},
                )
            return self._clients[scheme]

    def _is_registry(self, url: httpx.URL) -> bool:
        return _origin(url) == _origin(self._root)

    @contextmanager
    def _translated(self, subject: str) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise self._broken(error, subject) from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise FailedError(
                f"{self.words} does not answer in HTTP, asked for {subject}: {type(error).__name__} - "
                "check its address"
            ) from error

    def _broken(self, error: httpx.TransportError, subject: str) -> FlopsError:
        reason = str(error)[:200] or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return FailedError(
                f"the certificate of {self.words} is not trusted: {reason.rpartition('failed: ')[2]} - "
                f"put its authority into ~/.config/docker/certs.d/{self.host}/ca.crt, or among this machine's"
            )
        if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
            return FailedError(
                f"{self.words} does not speak TLS - give it a certificate, or allow plain HTTP"
            )
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
            with suppress(RuntimeError):  # the error knows no request
                if error.request.url.host != self._root.host:
                    reason += f", at {error.request.url.host} to which it refers"
            return TryAgainError(
                f"{self.words} cannot be reached for {subject}: {reason} - start it, "
                "or name another one in FLOPS_REGISTRY"
            )
        return TryAgainError(
            f"the connection with {self.words} broke over {subject}: {reason} - "
            "see whether it runs, then try again"
        )


def pieces(response: httpx.Response, size: int, subject: str) -> Iterator[bytes]:
    """An answer's body as it comes, undecoded, at most ``size`` bytes, and not for ever.

    Raises:
        FailedError: there is more.
        TryAgainError: it comes too slowly.
    """
    deadline = time.monotonic() + _DOCUMENT_S + size / _SLOWEST_BYTES_PER_S
    count = 0
    for piece in response.iter_raw():
        count += len(piece)
        if count > size:
            raise FailedError(f"{subject} has more than the {size} bytes that it may have")
        if time.monotonic() > deadline:
            raise TryAgainError(f"{subject} comes too slowly - look at the network, then try again")
        yield piece


def reasons(body: bytes) -> str:
    """What a registry says for itself in a refusal, in brackets, for people; empty: nothing."""
    try:
        entries: Any = json.loads(body)["errors"]
        said = [f"{entry.get('code', '')} {entry.get('message', '')}".strip() for entry in entries[:3]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    text = "".join(char if char.isprintable() else " " for char in "; ".join(said))
    return f" ({text[:200]})" if text else ""


def _read(response: httpx.Response, limit_bytes: int, subject: str, *, cut: bool = False) -> bytes:
    content = bytearray()
    try:
        for piece in pieces(response, limit_bytes, subject):
            content += piece
    except FailedError:
        if not cut:
            raise
    return bytes(content)


def _retry_after(text: str) -> float:
    if text.isascii() and text.isdigit():
        return min(float(text[:6]), _MAX_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, min(until - time.time(), _MAX_RETRY_AFTER_S))


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


@functools.cache
def _machines_trust() -> ssl.SSLContext:
    return ssl.create_default_context()


def _trust(ca: Path) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(
            f"{ca} cannot be read as certificates of an authority - name a PEM file"
        ) from error
    return context
