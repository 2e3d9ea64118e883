"""Errors as HTTP answers: one table from error class to status, one form (RFC 9457,
application/problem+json).
"""

import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flops.api.schemas import Problem
from flops.core import errors
from flops.core.errors import FlopsError
from flops.telemetry import about, current_request

log = logging.getLogger(__name__)

STATUS: Mapping[type[FlopsError], HTTPStatus] = {
    errors.InvalidInputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.NotFoundError: HTTPStatus.NOT_FOUND,
    errors.ConflictError: HTTPStatus.CONFLICT,
    errors.UnauthorizedError: HTTPStatus.UNAUTHORIZED,
    errors.ForbiddenError: HTTPStatus.FORBIDDEN,
    errors.TooManyRequestsError: HTTPStatus.TOO_MANY_REQUESTS,
    errors.UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.FailedError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.FlopsError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
_CODES = {
    HTTPStatus.NOT_FOUND: errors.NotFoundError.code,
    HTTPStatus.UNAUTHORIZED: errors.UnauthorizedError.code,
    HTTPStatus.FORBIDDEN: errors.ForbiddenError.code,
}
REQUEST_HEADER = "X-Request-ID"
MEDIA_TYPE = "application/problem+json"
_NAMED = re.compile(r"\{\w+\}")
"""Parameters in the path of a route."""
_ANYWHERE = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
)


SLOW = {"x-flops-slow": True}
"""Of a route, in the OpenAPI document: its answer may take minutes."""


def status_of(error: FlopsError) -> HTTPStatus:
    """The status of the error's class, or of the nearest class above it that has one."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem(status: HTTPStatus, code: str, detail: str) -> JSONResponse:
    body = Problem(
        type=f"urn:flops:error:{code}",
        title=status.phrase,
        status=int(status),
        detail=detail,
        code=code,
        request=current_request() or None,
    )
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(body.model_dump(exclude_none=True), status, headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every error of the application a problem."""
    app.add_exception_handler(FlopsError, _of_flops)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_anything)


def documented(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says about a route's errors."""
    return {
        int(status): {
            "description": status.phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in (*_ANYWHERE, *statuses)
    }


async def _of_flops(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FlopsError)
    answer = problem(status_of(error), error.code, str(error))
    if isinstance(error, errors.TooManyRequestsError):
        answer.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return answer


async def _of_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [
        ".".join(str(part) for part in item["loc"] if part != "body") + f": {item['msg']}"
        for item in error.errors()
    ]
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY, errors.InvalidInputError.code, "; ".join(found).lstrip(": ")
    )


async def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = error.detail
    if status == HTTPStatus.BAD_REQUEST:  # FastAPI's word for bytes that are no text
        status, detail = HTTPStatus.UNPROCESSABLE_ENTITY, "the body cannot be read - send JSON in UTF-8"
    if detail == status.phrase:
        detail = f"{request.method} {request.url.path} is not served here - see /v1/openapi.json"
    answer = problem(status, _CODES.get(status, errors.InvalidInputError.code), detail)
    if "Allow" in (error.headers or {}):
        allowed = _methods(request) or {(error.headers or {})["Allow"]}
        answer.headers["Allow"] = ", ".join(sorted(allowed))
    return answer


def _methods(request: Request) -> set[str]:
    """What may be done at a path: several routes may share it. A path without parameters comes before those
    with, as the OpenAPI document has it.
    """
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    asked = request.url.path
    matching = [item for path, item in paths.items() if re.fullmatch(_NAMED.sub("[^/]+", path), asked)]
    found = [paths[asked]] if asked in paths else matching
    return {method.upper() for item in found for method in item}


async def _of_anything(request: Request, error: Exception) -> JSONResponse:
    known = getattr(request.state, "request_id", None)
    with about(request=known):
        log.error("%s %s", request.method, request.url.path, exc_info=error)
        answer = problem(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            FlopsError.code,
            f"internal error of the manager ({type(error).__name__}) - see its log for request {known}, and "
            "report it",
        )
    if known is not None:
        answer.headers[REQUEST_HEADER] = known
    return answer
