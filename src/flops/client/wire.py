"""What both clients share: a call as a value, and what may be done again when it goes wrong."""

import uuid
from collections.abc import AsyncIterable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx

from flops.client.errors import ManagerAwayError, NotAnsweredError, NotSentError, not_a_manager
from flops.core.errors import FlopsError, TooManyRequestsError

CONNECT_TIMEOUT_S = 5.0
# Mocking a data set may fetch it first; writing a model's archive may need its copy from the artifact store.
SLOW_TIMEOUT = httpx.Timeout(600.0, connect=CONNECT_TIMEOUT_S)
KEY = "Idempotency-Key"
_REPEATABLE = frozenset({"GET", "HEAD", "PUT"})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0

Content = bytes | BinaryIO | Iterable[bytes] | AsyncIterable[bytes]
"""A body that is no JSON: whole, an open file, or in parts. Only a whole one can be sent twice."""


@dataclass(frozen=True)
class Call:
    """One request, as the generated methods make it.

    Args:
        path: with ``{names}``, which ``where`` holds.
        query, headers, body: values that are None are left out.
        content: in place of a JSON body.
        slow: the answer may take minutes.
    """

    method: str
    path: str
    where: Mapping[str, object] = field(default_factory=dict)
    query: Mapping[str, object] = field(default_factory=dict)
    headers: Mapping[str, object] = field(default_factory=dict)
    body: Any = None
    content: Content | None = None
    slow: bool = False

    @property
    def url(self) -> str:
        return self.path.format(**{name: quote(str(part), safe="") for name, part in self.where.items()})

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again although something may have been done."""
        whole = self.content is None or isinstance(self.content, bytes)
        return whole and (self.method in _REPEATABLE or KEY in self.headers)

    def options(self) -> dict[str, Any]:
        """What httpx is told beside method and URL."""
        given: dict[str, Any] = {
            "params": {key: _in_query(value) for key, value in self.query.items() if value is not None},
            "headers": {key: str(value) for key, value in self.headers.items() if value is not None},
        }
        if self.slow:
            given["timeout"] = SLOW_TIMEOUT
        if self.content is not None:
            given["content"] = _parts(self.content)
        elif self.body is not None:
            given["json"] = self.body
        return given


def pause_before_next(call: Call, error: FlopsError, attempt: int, attempts: int) -> float | None:
    """How long to wait before the call is sent again; None: it is not.

    Args:
        attempt: the one that failed, counted from 1.
    """
    if attempt >= attempts:
        return None
    if isinstance(error, TooManyRequestsError):
        unsent = call.content is None or isinstance(call.content, bytes)
        return min(error.retry_after_s, _LONGEST_PAUSE_S) if unsent else None
    broken = isinstance(error, ManagerAwayError) and not isinstance(error, NotAnsweredError)
    if isinstance(error, NotSentError) or (broken and call.repeatable):
        return min(_FIRST_PAUSE_S * 4.0 ** (attempt - 1), _LONGEST_PAUSE_S)
    return None


def new_key() -> str:
    """An Idempotency-Key that nobody else uses."""
    return uuid.uuid4().hex


def without_none(values: Mapping[str, object]) -> dict[str, object]:
    """A JSON body: what was not given is left out."""
    return {key: value for key, value in values.items() if value is not None}


def json_of(response: httpx.Response) -> Any:
    """Raises: FailedError: it is no JSON."""
    try:
        return response.json()
    except ValueError as error:
        raise not_a_manager(response.request.method, str(response.request.url)) from error


def _in_query(value: object) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return value
    assert isinstance(value, Iterable)
    return [str(one) for one in value]


def _parts(content: Content) -> Any:
    if isinstance(content, bytes) or not hasattr(content, "read"):
        return content
    file = content
    return iter(lambda: file.read(1 << 20), b"")
