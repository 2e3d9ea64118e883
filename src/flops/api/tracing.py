"""The id of each request: brought by the caller or made here, answered in a header, and known to everything
that the request sets in motion.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.api.problems import REQUEST_HEADER
from flops.telemetry import about, request_of, span, span_of_request, trace_of

_TRACE_HEADER = "traceparent"


class Identified:
    """Gives every request its id, for as long as it is worked on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request = request_of(headers.get(REQUEST_HEADER), headers.get(_TRACE_HEADER))

        scope.setdefault("state", {})["request_id"] = request  # an internal error is answered outside

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_HEADER] = request
            await send(message)

        above = headers.get(_TRACE_HEADER) or ""
        known = span_of_request(request)
        with (
            about(request=request),
            span(scope["method"], parent=above if trace_of(above) else "", itself=known) as seen,
        ):
            await self._app(scope, receive, named)
            route = scope.get("route")
            seen.name = f"{scope['method']} {route.path}" if route is not None else scope["method"]
