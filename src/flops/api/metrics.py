"""Figures of the manager for Prometheus, requests to this API among them."""

import time
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flops.api.problems import documented
from flops.manager import Figures, Manager

_BUCKETS_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


def metrics_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(tags=["manager"])

    @routes.get(
        "/v1/metrics",
        response_class=Response,
        responses=documented() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Figures in Prometheus' text format",
    )
    def get_metrics() -> Response:
        return Response(generate_latest(manager.figures.registry), media_type=CONTENT_TYPE_LATEST)

    return routes


class Counted:
    """Counts requests by route and status, and times them until their answer begins."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app = app
        labels = ("method", "route", "status")
        registry = figures.registry
        self._requests = Counter("flops_http_requests", "Requests to the REST API", labels, registry=registry)
        self._seconds = Histogram(
            "flops_http_seconds",
            "Time until the answer of a request begins",
            labels[:2],
            registry=registry,
            buckets=_BUCKETS_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and not status:
                status = message["status"]
                self._count(scope, status, time.monotonic() - begun)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if not status:
                self._count(scope, int(HTTPStatus.INTERNAL_SERVER_ERROR), time.monotonic() - begun)

    def _count(self, scope: Scope, status: int, taken_s: float) -> None:
        route: Any = scope.get("route")
        # Neither may be a caller's free choice: each value is kept for ever.
        where = str(route.path) if route is not None else "unknown"
        method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"
        self._requests.labels(method, where, str(status)).inc()
        self._seconds.labels(method, where).observe(taken_s)
