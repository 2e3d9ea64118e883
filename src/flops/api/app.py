"""The two applications: the REST API, and the routes where services report."""

import asyncio
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request
from fastapi.routing import APIRoute

from flops import __version__
from flops.api import problems, schemas
from flops.api.access import (
    LOOPBACK,
    Audited,
    Guard,
    LimitedBody,
    Limits,
    NodeGuard,
    OwnNamesOnly,
    bearer_token,
)
from flops.api.admin import admin_routes
from flops.api.behind import Behind, gui_url
from flops.api.beside import Beside, Pages
from flops.api.data import MAX_UPLOAD_BYTES, UPLOAD_PATH, data_routes
from flops.api.health import health_routes, readiness_routes
from flops.api.identity import authority_routes, identity_routes
from flops.api.images import image_routes
from flops.api.metrics import Counted, metrics_routes
from flops.api.models import model_routes
from flops.api.node import MAX_SYNC_BYTES, SYNC_PATH, joined_node_routes, joining_routes
from flops.api.nodes import node_routes, top_routes
from flops.api.problems import SLOW, documented
from flops.api.projects import project_routes
from flops.api.reference import reference_routes
from flops.api.signing_in import sign_in_routes
from flops.api.specs import spec_routes
from flops.api.tracing import Identified
from flops.core.ids import project_id
from flops.manager import Manager, parse_report

_MAX_BODY_BYTES = 1 << 20
_MAX_PREDICTION_BYTES = 16 << 20
_MAX_REPORTS_BYTES = 64 << 20
_MAX_MODEL_BYTES = 64 << 30
SHA256_HEADER = "X-FLOps-SHA256"


def create_app(
    manager: Manager,
    token: str,
    stop: Callable[[], None],
    names: Iterable[str] = (),
    pages: Pages | None = None,
) -> FastAPI:
    """The REST API.

    Args:
        token: of this FLOPS_HOME's own user, who may do everything.
        stop: ends the server, after the answer was sent.
        names: by which other machines call it.
        pages: the GUI, served under all other paths.
    """
    app = FastAPI(
        title="FLOps",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=_name,
    )
    problems.install(app)
    app.include_router(health_routes())
    app.include_router(authority_routes(manager))
    app.include_router(sign_in_routes(manager))
    limits = Limits()
    guard = Guard(manager, token, limits)
    app.include_router(joining_routes(manager, limits))
    app.include_router(joined_node_routes(manager), dependencies=[Depends(NodeGuard(manager, guard, limits))])
    guarded = [Depends(guard)]
    for routes in (
        identity_routes(manager),
        project_routes(manager),
        spec_routes(),
        data_routes(manager),
        model_routes(manager),
        node_routes(manager),
        top_routes(manager),
        readiness_routes(manager),
        metrics_routes(manager),
        image_routes(manager),
        reference_routes(manager),
        admin_routes(manager),
        _own_routes(manager, stop),
    ):
        app.include_router(routes, dependencies=guarded)
    # The last one added is the first one asked.
    app.add_middleware(
        LimitedBody,
        limit_bytes=_limit_bytes,
    )
    app.add_middleware(Behind, manager=manager, guard=guard, pages=pages)
    app.add_middleware(Audited, manager=manager)
    if pages is not None:
        app.add_middleware(Beside, pages=pages)
    app.add_middleware(OwnNamesOnly, names=(*LOOPBACK, *map(_in_header, names)))
    app.add_middleware(Counted, figures=manager.figures)
    app.add_middleware(Identified)
    _document_problems(app)
    return app


def _in_header(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _name(route: APIRoute) -> str:
    """What the client's method is called, too: its function's name."""
    return route.name


def _limit_bytes(path: str) -> int:
    if path == UPLOAD_PATH:
        return MAX_UPLOAD_BYTES
    if path == SYNC_PATH:
        return MAX_SYNC_BYTES
    return _MAX_PREDICTION_BYTES if path.endswith("/predictions") else _MAX_BODY_BYTES


def create_reports_app(manager: Manager) -> FastAPI:
    """Where services report: those of this machine on a Unix socket in a private folder, others over TLS."""
    app = FastAPI(title="FLOps reports", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    problems.install(app)

    @app.post("/internal/v1/projects/{project}/reports", response_model=schemas.Accepted)
    def report(project: str, reports: schemas.Reports, request: Request) -> Any:
        checked = project_id(project)
        manager.check_reporter(checked, bearer_token(request))
        parsed = [parse_report(item.seq, item.time, item.kind, item.data) for item in reports.reports]
        return {"accepted": manager.report(checked, reports.source, parsed)}

    @app.put(
        "/internal/v1/projects/{project}/model",
        status_code=HTTPStatus.CREATED,
        summary="The trained model, from an aggregator that shares no files with the manager",
    )
    async def receive_model(project: str, request: Request) -> dict[str, str]:
        checked = project_id(project)
        await asyncio.to_thread(manager.check_reporter, checked, bearer_token(request))
        sha256 = request.headers.get(SHA256_HEADER, "")
        with await asyncio.to_thread(manager.receive_model, checked, sha256) as upload:
            async for part in request.stream():
                await asyncio.to_thread(upload.write, part)
            await asyncio.to_thread(upload.commit)
        return {"sha256": sha256}

    app.add_middleware(
        LimitedBody,
        limit_bytes=lambda path: _MAX_MODEL_BYTES if path.endswith("/model") else _MAX_REPORTS_BYTES,
    )
    return app


def _own_routes(manager: Manager, stop: Callable[[], None]) -> APIRouter:
    routes = APIRouter(tags=["manager"])

    @routes.post(
        "/v1/ui",
        response_model=schemas.Ui,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        openapi_extra=SLOW,
        summary="The address of MLflow's GUI, started where it does not run",
    )
    def start_ui(request: Request) -> Any:
        return {"url": gui_url(manager, request)}

    @routes.post(
        "/v1/shutdown",
        status_code=HTTPStatus.ACCEPTED,
        response_model=schemas.Stopping,
        responses=documented(HTTPStatus.CONFLICT),
        summary="End the manager and its services",
    )
    def shut_down(
        tasks: BackgroundTasks, request: Annotated[schemas.ShutdownRequest | None, Depends(_optional)]
    ) -> Any:
        manager.shut_down(force=request is not None and request.force)
        tasks.add_task(stop)
        return {"status": "stopping"}

    return routes


def _optional(request: schemas.ShutdownRequest | None = None) -> schemas.ShutdownRequest | None:
    return request


def _document_problems(app: FastAPI) -> None:
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        document["components"]["schemas"].setdefault("Problem", schemas.Problem.model_json_schema())
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for item in document["paths"].values():
            for operation in item.values():
                if "401" in operation["responses"]:
                    operation["security"] = [{"token": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
