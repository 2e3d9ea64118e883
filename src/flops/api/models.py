"""Routes of registered models."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from flops.api import schemas
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
        name: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
        after: Annotated[str | None, Query(max_length=300, description="'next' of the page before")] = None,
    ) -> Any:
        return manager.models(name, after, limit)

    @routes.get(
        "/{name}",
        response_model=schemas.ModelVersions,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="A model with its versions, the newest first",
    )
    def get_model(name: str) -> Any:
        return {"name": name, "versions": manager.versions(name)}

    @routes.get(
        "/{name}/versions/{version}",
        response_model=schemas.ModelView,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="One version of a model",
    )
    def get_model_version(name: str, version: _Version) -> Any:
        return manager.model(name, version)

    @routes.get(
        "/{name}/versions/{version}/archive",
        response_class=StreamingResponse,
        responses=documented(HTTPStatus.NOT_FOUND)
        | {200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}},
        openapi_extra=SLOW,
        summary="A registered model: MLflow's folder and the bare parameters, as a tar archive",
    )
    def get_model_archive(name: str, version: _Version) -> Any:
        files = manager.model_files(name, version)
        return StreamingResponse(
            tar(files),
            media_type="application/x-tar",
            headers={"Content-Disposition": f'attachment; filename="model-{version}.tar"'},
        )

    return routes
