"""From what came over the wire, or did not, to errors of FLOps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from flops.core.errors import (
    BY_CODE,
    ConflictError,
    FailedError,
    FlopsError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)

_BY_CODE: Mapping[str, type[FlopsError]] = {**BY_CODE, FlopsError.code: FlopsError}
_BY_STATUS: Mapping[int, type[FlopsError]] = {
    401: UnauthorizedError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}
_TOO_MANY = 429


class ManagerAwayError(UnavailableError):
    """Nobody answers at the manager's address: it was stopped or killed, or is starting."""


class NotSentError(ManagerAwayError):
    """No connection came about, so nothing was done: any request may be sent again."""


class NotAnsweredError(ManagerAwayError):
    """The answer did not come in time; whether anything was done is not known."""


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raises: ManagerAwayError: the manager could not be reached, or the connection broke."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotSentError(
            f"the manager at {url} cannot be reached ({error}) - start it with 'flops up'"
        ) from error
    except httpx.TimeoutException as error:
        raise NotAnsweredError(
            f"the manager at {url} did not answer in time - try again, or see its log"
        ) from error
    except httpx.TransportError as error:
        raise ManagerAwayError(
            f"the manager at {url} cannot be reached ({error}) - start it with 'flops up'"
        ) from error


def error_of(response: httpx.Response) -> FlopsError:
    """What a response that is no success, and was read, tells."""
    try:
        body = response.json()
    except ValueError:
        body = {}
    problem = body if isinstance(body, dict) else {}
    # "message" is how a model's server says it, in MLflow's protocol
    detail = problem.get("detail") or problem.get("message") or problem.get("title")
    detail = detail or response.text[:500].strip()
    text = str(detail) if detail else f"the manager answered with status {response.status_code}"
    if response.status_code == _TOO_MANY:
        return TooManyRequestsError(text, _seconds(response.headers.get("retry-after", "")))
    kind = _BY_CODE.get(str(problem.get("code", ""))) or _BY_STATUS.get(response.status_code)
    if kind is None:
        kind = FailedError if response.is_server_error else InvalidInputError
    return kind(text)


def told_error(value: Mapping[str, Any]) -> FlopsError:
    """An error that stands in a stream: ``code`` and ``detail``."""
    return _BY_CODE.get(str(value.get("code")), FailedError)(str(value.get("detail")))


def not_a_manager(method: str, url: str) -> FailedError:
    return FailedError(f"{method} {url} did not answer as a manager does - is it one?")


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() else 1.0
