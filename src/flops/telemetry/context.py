"""What is being done, for whom: the facts that every log line carries, and that one process hands to the
next.

Two layers: what is true of the whole process (`always`), and what is true of this thread or task while it
does something (`about`). The id of a request goes from the API through everything that it sets in motion.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

FIELDS = ("service", "project", "learner", "round", "request")
"""In the order in which a log line names them."""

MAX_REQUEST_CHARS = 64
_REQUEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-[!-~]{0,200})?")

_process: dict[str, str | int] = {}
_now: ContextVar[Mapping[str, str | int]] = ContextVar("flops-context", default={})  # noqa: B039 - never changed


@dataclass(frozen=True)
class Traced:
    """What a service is told of the request that it runs for."""

    request: str = ""
    """Id of the request; empty: nobody's."""
    parent: str = ""
    """Span (W3C ``traceparent``) that what the service does belongs to; empty: none is recorded."""
    collector: str = ""
    """Where spans go (OTLP over HTTP); empty: nowhere."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> "Traced":
        return cls(**(data or {}))


NOBODYS = Traced()


def always(**facts: str | int | None) -> None:
    """From now on true of this process; empty ones are left out."""
    _process.update({name: value for name, value in facts.items() if value not in (None, "")})


@contextmanager
def about(**facts: str | int | None) -> Iterator[None]:
    """True of what this thread or task does inside; empty ones change nothing."""
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    token = _now.set({**_now.get(), **known})
    try:
        yield
    finally:
        _now.reset(token)


def current() -> dict[str, str | int]:
    """All facts of this moment."""
    return {**_process, **_now.get()}


def current_request() -> str:
    """Id of the request that this is done for; empty: nobody's."""
    return str(current().get("request", ""))


def new_request() -> str:
    """An id for a request that brought none; it is a W3C trace id, too."""
    return secrets.token_hex(16)


def is_request(text: str) -> bool:
    """Whether a text from outside can be a request's id: it goes into logs, files and headers as it is."""
    return _REQUEST.fullmatch(text) is not None


def request_of(request_id: str | None, traceparent: str | None) -> str:
    """The id of a request, by its headers: its own, the trace that it belongs to, or a new one.

    What is no id, or no trace, counts as not sent: nobody's request fails for the sake of a log line.
    """
    if request_id is not None and is_request(request_id):
        return request_id
    return trace_of(traceparent) or new_request()


def trace_of(traceparent: str | None) -> str | None:
    """The trace id in a W3C ``traceparent``; None: it is none."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    if found is None or not int(found.group(1), 16) or not int(found.group(2), 16):
        return None
    return found.group(1) if not (traceparent or "").startswith("ff") else None
