"""Routes of the orchestrator's nodes."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter

from flops.api import schemas
from flops.api.problems import documented
from flops.manager import Manager


def node_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/nodes", tags=["nodes"])

    @routes.get(
        "",
        response_model=schemas.NodeList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        summary="The machines that services are placed on",
    )
    def list_nodes() -> Any:
        return {"nodes": manager.nodes()}

    return routes
