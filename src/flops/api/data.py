"""Routes of training data. Tables pass through a temporary file, never through the manager's memory."""

import asyncio
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from flops.api import schemas
from flops.api.access import caller_of
from flops.api.problems import SLOW, documented
from flops.core.errors import InvalidInputError
from flops.identity import Role
from flops.manager import Manager

MAX_UPLOAD_BYTES = 16 << 30
UPLOAD_PATH = "/v1/data/fragments"
_Tags = Annotated[list[str], Query(default_factory=list)]


def _labels(given: list[str]) -> dict[str, str]:
    labels = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in labels:
            raise InvalidInputError(
                f"label '{text[:80]}' is not NAME=VALUE, or the second of its name - send ?label=region=north"
            )
        labels[name] = value
    return labels


def only_of(request: Request) -> str | None:
    """Whose data the caller sees and changes; None: all."""
    caller = caller_of(request)
    return caller.user if caller.role is Role.DATA_OWNER else None


def data_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/data", tags=["data"])

    @routes.post(
        "/fragments",
        status_code=HTTPStatus.CREATED,
        response_model=schemas.FragmentView,
        responses=documented(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.SERVICE_UNAVAILABLE),
        openapi_extra=SLOW
        | {
            "requestBody": {
                "required": True,
                "content": {
                    "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}}
                },
            }
        },
        summary="Store a Parquet file as a fragment",
    )
    async def put_fragment(
        request: Request,
        tag: _Tags,
        label: Annotated[list[str], Query(default_factory=list, description="NAME=VALUE")],
        site: str = "local",
        allow_metrics: bool = False,
        node: str | None = None,
    ) -> Any:
        if not tag:
            raise InvalidInputError("a fragment needs a tag - send at least one, as ?tag=NAME")
        labels = _labels(label)
        with tempfile.TemporaryDirectory(prefix="upload-", dir=manager.settings.home) as folder:
            path = Path(folder) / "fragment.parquet"
            with path.open("wb") as file:
                async for chunk in request.stream():
                    await asyncio.to_thread(file.write, chunk)
            return await asyncio.to_thread(
                manager.put_fragment,
                path,
                tag,
                site,
                allow_metrics=allow_metrics,
                labels=labels,
                node=node,
                owner=only_of(request),
            )

    @routes.get(
        "/fragments",
        response_model=schemas.FragmentList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        summary="Fragments; with tags, those with any of them; data owners see their own",
    )
    def list_fragments(request: Request, tag: _Tags, site: str | None = None) -> Any:
        return {"fragments": manager.fragments(tag, site, owner=only_of(request))}

    @routes.get(
        "/tags",
        response_model=schemas.DataTagList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        summary="What is held under each data tag",
    )
    def list_data_tags(request: Request) -> Any:
        return {"tags": manager.data_tags(owner=only_of(request))}

    @routes.get(
        "/uses",
        response_model=schemas.DataUseList,
        responses=documented(),
        summary="What ran on data: whose code, what left the site; not of others' projects or nodes",
    )
    def list_data_uses(
        request: Request,
        site: Annotated[str | None, Query(max_length=200)] = None,
        tag: Annotated[str | None, Query(max_length=200)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Any:
        caller = caller_of(request)
        all_of_them = caller.sees_all or caller.role is Role.DATA_OWNER
        user = None if all_of_them else caller.user
        holdings = manager.holdings_of(caller.user) if caller.role is Role.DATA_OWNER else None
        uses = manager.uses_of_data(
            site=site, tag=tag, user=user, teams=caller.teams, holdings=holdings, limit=limit
        )
        return {"uses": uses}

    @routes.delete(
        "/fragments/{fragment}",
        status_code=HTTPStatus.NO_CONTENT,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
        summary="Remove a fragment",
    )
    def drop_fragment(fragment: str, request: Request) -> Response:
        manager.drop_fragment(fragment, owner=only_of(request))
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @routes.post(
        "/mock",
        response_model=schemas.FragmentList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        openapi_extra=SLOW,
        summary="Spread a known data set over sites",
    )
    def mock_data(wanted: schemas.MockRequest, request: Request) -> Any:
        sites = wanted.sites
        if isinstance(sites, int):
            sites = [f"site-{number}" for number in range(1, sites + 1)]
        arguments = wanted.model_dump() | {"sites": sites}
        return {"fragments": manager.mock(arguments, owner=only_of(request))}

    return routes
