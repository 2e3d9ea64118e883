"""Whether the manager lives, and whether it can do its work."""

import os
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Response

from flops import __version__
from flops.api import schemas
from flops.api.problems import documented
from flops.manager import Manager


def health_routes() -> APIRouter:
    """Open to everybody: it says that the process answers, and nothing else."""
    routes = APIRouter(tags=["manager"])

    @routes.get("/v1/health", response_model=schemas.Health, summary="The manager's process answers")
    async def get_health() -> Any:
        return {"status": "ok", "version": __version__, "pid": os.getpid()}

    return routes


def readiness_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(tags=["manager"])

    @routes.get(
        "/v1/ready",
        response_model=schemas.Readiness,
        responses=documented() | {503: {"model": schemas.Readiness, "description": "Something is away"}},
        summary="Whether what the manager needs is there: database, orchestrator, recorder",
    )
    def get_readiness(response: Response) -> Any:
        found = manager.readiness()
        checks = {name: {"ok": reason is None, "reason": reason} for name, reason in found.items()}
        all_there = all(reason is None for reason in found.values())
        if not all_there:
            response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return {"ready": all_there, "checks": checks}

    return routes
