"""The endpoints of Oakestra's FLOps addon, for tools that speak to it: other words for our routes.

Bodies and the confirmations in ``message`` are the addon's. What differs: errors are problems as everywhere
here, the token is one of this manager's, and a confirmation comes when the thing is done or, of a project,
committed. ``customerID`` may be left out: who asks follows from the token.
"""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from flops.api.access import caller_of, sight_of
from flops.api.behind import gui_url
from flops.api.data import only_of
from flops.api.once import IdempotencyKey, once
from flops.api.problems import SLOW, documented
from flops.core.errors import ForbiddenError, InvalidInputError
from flops.core.ids import ProjectId
from flops.manager import Manager

_DATA_SETS = ("mnist", "digits")
_ADMIN = "Admin"


class MockDataConfiguration(BaseModel):
    model_config = ConfigDict(strict=True)

    dataset_name: str = "mnist"
    number_of_partitions: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Each becomes a site, so that a project has a learner for each."""
    data_tag: Annotated[str, Field(min_length=1, max_length=256)]


class MockSla(BaseModel):
    model_config = ConfigDict(extra="allow")
    customer_id: Annotated[str | None, Field(alias="customerID")] = None
    mock_data_configuration: MockDataConfiguration


class ResetRequest(BaseModel):
    customer_id: Annotated[str, Field(alias="customerID")]
    """``Admin``: nobody else may."""


class Confirmation(BaseModel):
    message: str


class ProjectConfirmation(Confirmation):
    project: str
    """Its id at ``/v1/projects``."""


class MockConfirmation(Confirmation):
    fragments: list[str]


class TrackingServer(BaseModel):
    tracking_server_url: str


class _Sla(BaseModel):
    """The SLA as it came: what the Idempotency-Key is compared by."""

    sla: dict[str, Any]


def reference_routes(manager: Manager) -> APIRouter:
    routes = APIRouter(prefix="/api/flops", tags=["reference"])

    @routes.post(
        "/projects",
        response_model=ProjectConfirmation,
        responses=documented(HTTPStatus.CONFLICT),
        summary="Submit a project, as the SLA of the FLOps thesis",
    )
    def submit_sla(
        sla: Annotated[dict[str, Any], Body()],
        request: Request,
        response: Response,
        key: IdempotencyKey = None,
    ) -> Any:
        owner, sight = caller_of(request).user, sight_of(request)

        def carry_out(new: ProjectId) -> dict[str, Any]:
            made = manager.submit(sla, new, owner=owner, sight=sight)
            return {"message": "New FLOps project started successfully", "project": made["id"]}

        return once(manager, request, response, key, _Sla(sla=sla), carry_out)

    @routes.post(
        "/mocks",
        response_model=MockConfirmation,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        openapi_extra=SLOW,
        summary="Spread a known data set over sites",
    )
    def mock_sla(sla: MockSla, request: Request) -> Any:
        wanted = sla.mock_data_configuration
        if wanted.dataset_name not in _DATA_SETS:
            raise InvalidInputError(
                f"data set '{wanted.dataset_name[:60]}' is not known here - use {' or '.join(_DATA_SETS)}, "
                "or bring your own with 'flops data put'"
            )
        sites = [f"site-{number}" for number in range(1, wanted.number_of_partitions + 1)]
        made = manager.mock(
            {
                "dataset": wanted.dataset_name,
                "tags": [wanted.data_tag],
                "sites": sites,
                "partition": "iid",
                "seed": 0,
            },
            owner=only_of(request),
        )
        message = "New Mock-Data-Provider started successfully"
        return {"message": message, "fragments": [fragment["id"] for fragment in made]}

    @routes.get(
        "/tracking",
        response_model=TrackingServer,
        responses=documented(HTTPStatus.SERVICE_UNAVAILABLE),
        openapi_extra=SLOW,
        summary="The address of MLflow's GUI, started where it does not run",
    )
    def get_tracking(request: Request) -> Any:
        return {"tracking_server_url": gui_url(manager, request)}

    @routes.delete(
        "/database",
        response_model=Confirmation,
        responses=documented(HTTPStatus.CONFLICT),
        openapi_extra=SLOW,
        summary="Stop and forget all projects; registered models, data and users stay",
    )
    def reset_database(wanted: ResetRequest) -> Any:
        if wanted.customer_id != _ADMIN:
            raise ForbiddenError("Only Admins are allowed to reset the database!")
        manager.remove_all()
        return {"message": "Successfully reset the database."}

    return routes
