"""Routes of projects."""

import asyncio
import re
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from flops.api import schemas
from flops.api.access import caller_of, sight_of
from flops.api.kept import KeptAnswers, Made
from flops.api.once import IdempotencyKey, once
from flops.api.problems import SLOW, documented
from flops.api.stream import follow
from flops.core.errors import ForbiddenError, InvalidInputError
from flops.core.ids import ProjectId, project_id
from flops.identity import Role
from flops.manager import Manager, State, Wanted
from flops.telemetry import MAX_REQUEST_CHARS

_MAX_SEQ = 2**31 - 1
"""Of an event: what databases hold."""
_ALL: list[State] = []
_SCORING_TYPES = ("application/json", "text/csv")


def project_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/v1/projects", tags=["projects"])
    kept = KeptAnswers(manager.broadcast, manager.may_act)

    @routes.post(
        "",
        status_code=HTTPStatus.CREATED,
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.CONFLICT),
        summary="Submit a project: yours, or one of a team that you are in",
    )
    def submit_project(
        submission: schemas.Submission, request: Request, response: Response, key: IdempotencyKey = None
    ) -> Any:
        caller, sight, team = caller_of(request), sight_of(request), submission.team
        if team is not None and caller.role is not Role.ADMIN and team not in caller.teams:
            raise ForbiddenError(
                f"{caller.user} is not in team '{team}' - name one of yours, or ask an admin"
            )

        def carry_out(new: ProjectId) -> dict[str, Any]:
            request.state.about = f"project {new}"
            return manager.submit(submission.spec, new, owner=caller.user, team=team, sight=sight)

        return once(manager, request, response, key, submission, carry_out)

    @routes.get(
        "", response_model=schemas.ProjectList, responses=documented(), summary="Projects, the newest first"
    )
    async def list_projects(
        request: Request,
        state: Annotated[list[State], Query(description="Any of these")] = _ALL,
        name: Annotated[str | None, Query(max_length=200)] = None,
        text: Annotated[
            str | None, Query(max_length=200, description="Somewhere in id, name, source or reason")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[str | None, Query(max_length=100, description="'next' of the page before")] = None,
    ) -> Any:
        caller = caller_of(request)
        whose = None if caller.sees_all else caller.user
        wanted = Wanted(whose, caller.teams if whose else (), tuple(state), name, text, after, limit)

        def make() -> Made:
            page = manager.page(wanted)
            return _made(schemas.ProjectList, {"projects": page.projects, "next": page.next})

        return await kept.answer(None, wanted, make)

    @routes.get(
        "/{project}",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="A project with everything that is known about it",
    )
    async def get_project(project: str) -> Any:
        checked = project_id(project)

        def make() -> Made:
            view, lasts = manager.project_for_now(checked)
            return _made(schemas.ProjectView, view, lasts=lasts)

        return await kept.answer(checked, "project", make)

    @routes.post(
        "/{project}/stop",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Stop a project; it is 'stopped' within seconds",
    )
    def stop_project(project: str) -> Any:
        return manager.stop(project_id(project))

    @routes.post(
        "/{project}/pause",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Pause a project; it is 'paused' within seconds, and keeps what it has reached",
    )
    def pause_project(project: str) -> Any:
        return manager.pause(project_id(project))

    @routes.post(
        "/{project}/resume",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Let a paused project go on",
    )
    def resume_project(project: str) -> Any:
        return manager.resume(project_id(project))

    @routes.post(
        "/{project}/retry",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Attempt a failed or stopped project once more, from its last finished step or round",
    )
    def retry_project(project: str, request: Request, response: Response, key: IdempotencyKey = None) -> Any:
        checked = project_id(project)
        return once(manager, request, response, key, None, lambda _: manager.retry(checked))

    @routes.post(
        "/{project}/extend",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Let a finished or paused project train more rounds",
    )
    def extend_project(
        project: str,
        extension: schemas.Extension,
        request: Request,
        response: Response,
        key: IdempotencyKey = None,
    ) -> Any:
        checked = project_id(project)

        def carry_out(_: ProjectId) -> dict[str, Any]:
            return manager.extend(checked, extension.rounds)

        return once(manager, request, response, key, extension, carry_out, harmless=False)

    @routes.put(
        "/{project}/deployment",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        openapi_extra=SLOW,
        summary="Serve the newest model of a project; answers once it predicts",
    )
    def deploy_model(
        project: str,
        onnx: Annotated[bool, Query(description="Converted to ONNX, if it then answers alike")] = False,
    ) -> Any:
        return manager.deploy(project_id(project), onnx=onnx)

    @routes.delete(
        "/{project}/deployment",
        response_model=schemas.ProjectView,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="Serve it no longer",
    )
    def undeploy_model(project: str) -> Any:
        return manager.undeploy(project_id(project))

    @routes.post(
        "/{project}/predictions",
        responses=documented(
            HTTPStatus.NOT_FOUND, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.SERVICE_UNAVAILABLE
        ),
        openapi_extra={"requestBody": {"required": True, "content": {kind: {} for kind in _SCORING_TYPES}}},
        summary="Ask the served model, in MLflow's scoring protocol; its answer as it is",
    )
    async def predict(project: str, request: Request) -> Response:
        checked = project_id(project)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in _SCORING_TYPES:
            raise InvalidInputError(
                f"a prediction's body is of type '{content_type[:60]}' - send " + " or ".join(_SCORING_TYPES)
            )
        answer = await asyncio.to_thread(manager.predict, checked, content_type, await request.body())
        return Response(answer.body, answer.status, media_type=answer.content_type)

    @routes.delete(
        "/{project}",
        status_code=HTTPStatus.NO_CONTENT,
        responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT),
        summary="Forget a project that is at its end; registered models stay",
    )
    def remove_project(project: str, force: bool = False) -> Response:
        manager.remove(project_id(project), force=force)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @routes.get(
        "/{project}/events",
        response_model=schemas.EventList,
        responses=documented(HTTPStatus.NOT_FOUND) | {200: {"content": {"text/event-stream": {}}}},
        summary="Events so far, or (follow=true) as they happen",
    )
    async def list_events(
        project: str,
        after: Annotated[int, Query(ge=0, le=_MAX_SEQ)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        follow_on: Annotated[bool, Query(alias="follow")] = False,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Response:
        checked = project_id(project)
        if not follow_on:

            def make() -> Made:
                found = manager.events(checked, after, limit)
                return _made(schemas.EventList, {"events": [event.to_json() for event in found]})

            return await kept.answer(checked, ("events", after, limit), make)
        if last_event_id:
            if not re.fullmatch("[0-9]{1,10}", last_event_id) or int(last_event_id) > _MAX_SEQ:
                raise InvalidInputError(f"Last-Event-ID '{last_event_id[:40]}' is not an event's number")
            after = int(last_event_id)
        # An unknown project is an error, not an empty stream.
        await run_in_threadpool(manager.is_resting, checked)
        return StreamingResponse(
            follow(manager, checked, after),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    @routes.get(
        "/{project}/logs",
        response_model=schemas.Logs,
        responses=documented(HTTPStatus.NOT_FOUND),
        summary="The last lines of a project's services, by name",
    )
    def get_logs(
        project: str,
        service: str | None = None,
        tail: Annotated[int, Query(ge=1, le=100_000)] = 200,
        request: Annotated[
            str | None,
            Query(
                max_length=MAX_REQUEST_CHARS,
                description="Only log lines that were written for the request of this id",
            ),
        ] = None,
    ) -> Any:
        return {"logs": manager.logs(project_id(project), service, tail, request)}

    return routes


def _made(kind: type[BaseModel], content: dict[str, Any], *, lasts: bool = True) -> Made:
    """An answer that is what the OpenAPI document says of it."""
    return Made(kind.model_validate(content).model_dump_json().encode(), lasts)
