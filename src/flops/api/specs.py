"""Routes of specifications: what a project would be, before it is one."""

import re
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from flops.api import schemas
from flops.api.problems import documented
from flops.core.errors import InvalidInputError
from flops.core.spec import spec_from_mapping
from flops.core.spec_errors import InvalidSpecError
from flops.federation import check_strategy, strategy_names

_PLACE = re.compile(r"[a-zA-Z_]+(\.[\w-]+)*(?= )")


class SpecProblem(BaseModel):
    field: str
    """Its dotted place, such as ``training.rounds``; empty: the whole."""
    message: str


class Validation(BaseModel):
    valid: bool
    problems: list[SpecProblem]
    spec: dict[str, Any] | None
    """The whole of a valid spec in our own form, with what follows from what was given."""


class StrategyList(BaseModel):
    strategies: list[str]


def spec_routes() -> APIRouter:
    routes = APIRouter(prefix="/v1/specs", tags=["projects"])

    @routes.post(
        "/validate",
        response_model=Validation,
        responses=documented(),
        summary="Check a spec without starting anything; every problem with its field",
    )
    def validate_spec(submission: schemas.Submission) -> Any:
        try:
            spec = spec_from_mapping(submission.spec)
        except InvalidSpecError as error:
            return {"valid": False, "problems": [_problem(text) for text in error.problems], "spec": None}
        except InvalidInputError as error:
            return {"valid": False, "problems": [{"field": "", "message": str(error)}], "spec": None}
        try:
            check_strategy(spec.training.strategy.name, spec.training.strategy.parameters)
        except InvalidInputError as error:
            found = {"field": "training.strategy", "message": str(error)}
            return {"valid": False, "problems": [found], "spec": None}
        return {"valid": True, "problems": [], "spec": spec.to_json(redacted=True)}

    @routes.get(
        "/strategies", response_model=StrategyList, responses=documented(), summary="Names of all strategies"
    )
    def list_strategies() -> Any:
        return {"strategies": strategy_names()}

    return routes


def _problem(text: str) -> dict[str, str]:
    place = _PLACE.match(text)
    return {"field": place[0] if place else "", "message": text}
