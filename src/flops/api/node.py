"""What joined nodes call: they join, are told what is wanted of them, say what is there, and leave.

Connections come from the nodes alone, so an answer waits until there is something to say.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import StreamingResponse

from flops.api import node_schemas as schemas
from flops.api.access import SHOWN_OF_NODE, Limits, node_of
from flops.api.problems import SLOW, documented
from flops.core.ids import project_id
from flops.fleet import Seen
from flops.manager import Manager

SYNC_PATH = "/v1/node/sync"
MAX_SYNC_BYTES = 8 << 20
_PART_BYTES = 1 << 20
_Project = Annotated[str, Path(max_length=20)]


def joining_routes(manager: Manager, limits: Limits) -> APIRouter:
    """For machines that have no credential yet."""
    routes = APIRouter(prefix="/v1/node", tags=["joined nodes"])

    @routes.post(
        "/join",
        status_code=HTTPStatus.CREATED,
        response_model=schemas.Joined,
        responses=documented(HTTPStatus.CONFLICT),
        summary="Join as a node, once, with a join token",
    )
    def join_node(wanted: schemas.Joining, request: Request) -> Any:
        with limits.trying(request, wanted.token, SHOWN_OF_NODE):
            node, credential = manager.joined.join(
                wanted.token,
                platform=wanted.platform,
                cpus=wanted.cpus,
                memory_mb=wanted.memory_mb,
                version=wanted.version,
            )
        request.state.node = node
        request.state.about = f"node {node.name} of {node.owner}"
        return {"node": node.name, "owner": node.owner, "credential": credential}

    return routes


def joined_node_routes(manager: Manager) -> APIRouter:
    """For joined nodes, with their credentials."""
    routes = APIRouter(prefix="/v1/node", tags=["joined nodes"])
    joined = manager.joined

    @routes.post(
        "/sync",
        response_model=schemas.NodeOrders,
        responses=documented(HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        openapi_extra=SLOW,
        summary="Say what is there, and hear what is wanted, once that is something new",
    )
    async def sync_node(report: schemas.NodeReport, request: Request) -> Any:
        node = node_of(request)
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        end = joined.listen(node.name, wake)
        try:
            await asyncio.to_thread(
                joined.heard,
                node,
                known=report.known,
                allowance=report.policy.model_dump(),
                holdings=[holding.model_dump() for holding in report.holdings],
                services=[Seen(**service.model_dump(exclude={"usage"})) for service in report.services],
                usage={
                    service.name: service.usage.model_dump()
                    for service in report.services
                    if service.usage is not None
                },
                logs=report.logs,
            )
            deadline = time.monotonic() + report.wait_s
            while True:
                changed.clear()
                left = deadline - time.monotonic()
                over = left <= 0 or manager.broadcast.closed
                orders = await asyncio.to_thread(joined.told, node, report.known, always=over)
                if orders is not None:
                    return orders
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), left)
        finally:
            end()

    @routes.get(
        "/projects/{project}/code",
        response_class=StreamingResponse,
        responses=documented(HTTPStatus.NOT_FOUND)
        | {
            200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}},
        },
        summary="The code of a project that this node is wanted for, as a tar archive",
    )
    def get_code(project: _Project, request: Request) -> Any:
        archive = manager.code_for(node_of(request), project_id(project))

        def parts() -> Iterator[bytes]:
            with archive.open("rb") as file:
                while part := file.read(_PART_BYTES):
                    yield part

        headers = {"Content-Length": str(archive.stat().st_size)}
        return StreamingResponse(parts(), media_type="application/x-tar", headers=headers)

    @routes.get(
        "/projects/{project}/lock",
        response_model=schemas.CodeLock,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="The packages of a project that this node is wanted for, with every version decided",
    )
    def get_lock(project: _Project, request: Request) -> Any:
        return manager.lock_for(node_of(request), project_id(project))

    @routes.post(
        "/leave",
        response_model=schemas.Left,
        responses=documented(),
        summary="Leave: the credential is dead from now on, learners there are lost",
    )
    def leave_node(request: Request) -> Any:
        node = joined.leave(node_of(request).name, "it has left")
        return {"node": node.name}

    return routes
