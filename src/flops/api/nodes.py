"""Routes of nodes: the orchestrator's, and those that joined by themselves."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from flops.api import node_schemas, schemas
from flops.api.access import caller_of
from flops.api.problems import documented
from flops.core.errors import ForbiddenError, NotFoundError
from flops.identity import Role
from flops.manager import Manager

_Name = Annotated[str, Path(max_length=200)]


def top_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(tags=["nodes"])

    @routes.get(
        "/v1/top",
        response_model=schemas.Top,
        responses=documented(),
        summary="What nodes and services use now; the manager's own for those who see all projects",
    )
    def get_top(request: Request) -> Any:
        caller = caller_of(request)
        return manager.top(caller.sees, own=caller.sees_all)

    return routes


def node_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/nodes", tags=["nodes"])

    @routes.get(
        "",
        response_model=schemas.NodeList,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        summary="The machines that services are placed on; of those that joined, a data owner sees their own",
    )
    def list_nodes(request: Request) -> Any:
        caller = caller_of(request)
        owner = caller.user if caller.role is Role.DATA_OWNER else None
        return {"nodes": [*manager.nodes(), *manager.joined_nodes(owner)]}

    @routes.post(
        "/tokens",
        status_code=HTTPStatus.CREATED,
        response_model=node_schemas.MadeJoinToken,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Make a token with which one machine joins, once: it will be yours",
    )
    def add_join_token(wanted: node_schemas.NewJoinToken, request: Request) -> Any:
        caller = caller_of(request)
        owner = wanted.owner or caller.user
        if owner != caller.user and caller.role is not Role.ADMIN:
            raise ForbiddenError(f"join tokens for {owner} are made by {owner}, or by an admin")
        token, text = manager.add_join_token(wanted.node, owner, wanted.lasts_s)
        request.state.about = f"join token {token.id} for node {token.node} of {token.owner}"
        return {"node": token.node, "token": text, "owner": token.owner, "expires": token.expires}

    @routes.delete(
        "/{node}",
        status_code=HTTPStatus.NO_CONTENT,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="Eject a joined node: its credential is dead from now on, learners there are lost",
    )
    def eject_node(node: _Name, request: Request) -> Response:
        caller = caller_of(request)
        found = manager.joined.store.node(node)
        if caller.role is not Role.ADMIN and found.owner != caller.user:
            raise NotFoundError(f"no node '{node[:60]}' has joined - see 'flops node ls'")
        request.state.about = f"node {found.name} of {found.owner}"
        manager.joined.leave(found.name, f"{caller.user} has ejected it")
        return Response(status_code=HTTPStatus.NO_CONTENT)

    return routes
