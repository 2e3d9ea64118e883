"""Spans: what took how long inside what, sent to an OpenTelemetry collector where the operator names one.

Off, which is the rule, nothing of OpenTelemetry is imported and `span` costs nothing. On, spans wait in a
bounded queue for a thread that sends them; while the collector is away they are dropped, and nobody waits.

The spans of a request and of the project that it set in motion have ids that follow from the request, so a
manager that was killed, or another process, names the same parent without having been told.
"""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flops.core.errors import InvalidInputError
from flops.telemetry.context import trace_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

VARIABLES = ("FLOPS_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_SEND_S = 2.0
_parent: ContextVar[str] = ContextVar("flops-span", default="")


@dataclass(frozen=True)
class _Wanted:
    trace: str
    span: str


_wanted: ContextVar[_Wanted | None] = ContextVar("flops-span-ids", default=None)
_provider: "TracerProvider | None" = None


class Span:
    """What is going on."""

    def __init__(self, name: str, parent: str) -> None:
        self.name = name
        self.traceparent = parent
        """W3C, for whatever belongs inside; where nothing is recorded, that of the span around it."""


def collector_of(environment: Mapping[str, str] = os.environ) -> str:
    """Where spans go (OTLP over HTTP), as the operator says; empty: nowhere.

    Raises:
        InvalidInputError: that is no address.
    """
    found = next((environment[name] for name in VARIABLES if environment.get(name)), "")
    parts = urlsplit(found)
    if found and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise InvalidInputError(
            f"{' or '.join(VARIABLES)} is no http:// or https:// address - name the collector's, or unset it"
        )
    return found


def record_spans(service: str, collector: str) -> None:
    """From now on spans of this process go to the collector; empty: to nobody.

    Raises:
        InvalidInputError: OpenTelemetry's exporter is not installed.
    """
    global _provider
    if not collector or _provider is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import IdGenerator
    except ImportError as error:
        raise InvalidInputError(
            f"spans cannot be sent: {error} - install flops[otel], or unset {VARIABLES[0]}"
        ) from error

    class Ids(IdGenerator):
        """Random, but for what is wanted."""

        def generate_trace_id(self) -> int:
            wanted = _wanted.get()
            return int(wanted.trace if wanted and wanted.trace else secrets.token_hex(16), 16)

        def generate_span_id(self) -> int:
            wanted = _wanted.get()
            return int(wanted.span if wanted and wanted.span else secrets.token_hex(8), 16)

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a collector that is away is no news
    exporter = OTLPSpanExporter(endpoint=f"{collector.rstrip('/')}/v1/traces", timeout=_SEND_S)
    provider = TracerProvider(
        resource=Resource({"service.name": f"flops-{service}"}), id_generator=Ids(), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    _provider = provider


def records_spans() -> bool:
    return _provider is not None


def send_spans(within_s: float = _SEND_S) -> None:
    """Send what waits, at the end of a process; what does not arrive in that time is lost."""
    if _provider is not None:
        with suppress(Exception):
            _provider.force_flush(int(1000 * within_s))


def span_of_request(request: str) -> str:
    """The span of a request to the API, by its id; empty where nobody asked."""
    if not request:
        return ""
    digest = hashlib.sha256(request.encode()).hexdigest()
    trace = request if trace_of(f"00-{request}-{'1' * 16}-01") else digest[:32]
    return f"00-{trace}-{digest[32:48]}-01"


def span_of_project(project: str, request: str) -> str:
    """The span of what a request set in motion, inside that of the request."""
    if not request:
        return ""
    digest = hashlib.sha256(f"{project} {request}".encode()).hexdigest()
    return f"{span_of_request(request)[:35]}-{digest[:16]}-01"


def current_span() -> str:
    """The span around this moment; empty: none is recorded."""
    return _parent.get() if _provider is not None else ""


@contextmanager
def span(
    name: str, *, parent: str = "", itself: str = "", **facts: str | int | float | None
) -> Iterator[Span]:
    """Record what is done inside.

    Args:
        parent: the span that it belongs to; empty: the one around this moment.
        itself: the ids that it has to have; empty: new ones.
    """
    around = parent or _parent.get()
    seen = Span(name, around)
    if _provider is None:
        yield seen
        return
    begun = time.time()
    trace = around[3:35] if trace_of(around) else itself[3:35] or secrets.token_hex(16)
    own = itself[36:52] or secrets.token_hex(8)
    seen.traceparent = f"00-{trace}-{own}-01"
    token = _parent.set(seen.traceparent)
    failed: BaseException | None = None
    try:
        yield seen
    except BaseException as error:
        failed = error
        raise
    finally:
        _parent.reset(token)
        error_text = type(failed).__name__ if failed is not None else None
        record(
            seen.name, begun, time.time(), parent=around, itself=seen.traceparent, error=error_text, **facts
        )


@contextmanager
def within(parent: str) -> Iterator[None]:
    """Spans of what is done inside belong to this one, which is recorded by somebody else."""
    token = _parent.set(parent or _parent.get())
    try:
        yield
    finally:
        _parent.reset(token)


def record(
    name: str,
    begun: float,
    ended: float,
    *,
    parent: str = "",
    itself: str = "",
    error: str | None = None,
    **facts: str | int | float | None,
) -> None:
    """Record what has happened; times in seconds since 1970."""
    if _provider is None:
        return
    from opentelemetry import trace as api

    context = api.set_span_in_context(api.INVALID_SPAN)
    if trace_of(parent):
        flags = api.TraceFlags(api.TraceFlags.SAMPLED)
        above = api.SpanContext(int(parent[3:35], 16), int(parent[36:52], 16), True, flags)
        context = api.set_span_in_context(api.NonRecordingSpan(above))
    known: dict[str, Any] = {f"flops.{key}": value for key, value in facts.items() if value not in (None, "")}
    token = _wanted.set(_Wanted(itself[3:35], itself[36:52]))
    try:
        made = _provider.get_tracer("flops").start_span(
            name, context, attributes=known, start_time=int(begun * 1e9)
        )
    finally:
        _wanted.reset(token)
    if error is not None:
        made.set_status(api.StatusCode.ERROR, error)
    made.end(int(ended * 1e9))
