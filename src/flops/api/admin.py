"""Routes of whoever looks after the manager."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from flops.api.problems import SLOW, documented
from flops.manager import Manager


def admin_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/admin", tags=["manager"])

    @routes.post(
        "/backup",
        response_class=StreamingResponse,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE)
        | {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}},
        openapi_extra=SLOW,
        summary="All rows, projects' configurations and registered models as a tar archive; it holds secrets",
    )
    def back_up() -> Any:
        backup = manager.back_up()
        return StreamingResponse(
            backup.parts(),
            media_type="application/x-tar",
            headers={"Content-Disposition": 'attachment; filename="flops-backup.tar"'},
            background=BackgroundTask(backup.close),
        )

    return routes
