"""Routes of registered models."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from flops.api import schemas
from flops.api.access import sight_of
from flops.api.archive import tar
from flops.api.problems import SLOW, documented
from flops.manager import Manager

_Version = Annotated[int, Path(ge=1, le=2**31 - 1)]


def model_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get(
        "",
        response_model=schemas.ModelList,
        responses=documented(),
        summary="Versions of all models, the newest first",
    )
    def list_models(
        request: Request,
        name: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
        after: Annotated[str | None, Query(max_length=300, description="'next' of the page before")] = None,
    ) -> Any:
        return manager.models(name, after, limit, sight=sight_of(request))

    @routes.get(
        "/{name}",
        response_model=schemas.ModelVersions,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="A model with its versions, the newest first",
    )
    def get_model(name: str, request: Request) -> Any:
        return {"name": name, "versions": manager.versions(name, sight=sight_of(request))}

    @routes.get(
        "/{name}/versions/{version}",
        response_model=schemas.ModelView,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="One version of a model",
    )
    def get_model_version(name: str, version: _Version, request: Request) -> Any:
        return manager.model(name, version, sight=sight_of(request))

    @routes.get(
        "/{name}/versions/{version}/archive",
        response_class=StreamingResponse,
        responses=documented(HTTPStatus.NOT_FOUND)
        | {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}},
        openapi_extra=SLOW,
        summary="A registered model: MLflow's folder and the bare parameters, as a tar archive",
    )
    def get_model_archive(name: str, version: _Version, request: Request) -> Any:
        files = manager.model_files(name, version, sight=sight_of(request))
        return StreamingResponse(
            tar(files),
            media_type="application/x-tar",
            headers={"Content-Disposition": f'attachment; filename="model-{version}.tar"'},
        )

    return routes
