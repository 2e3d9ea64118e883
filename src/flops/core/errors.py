"""Errors: one root with stable codes; children are named after the caller's next move.

Every message says what happened, to which object, and what to do:
``round 7 of project p-42 needs 5 learners, 3 are connected - lower min_learners or see 'flops show p-42'``
"""

from collections.abc import Mapping
from typing import ClassVar


class FlopsError(Exception):
    """Root of all errors that FLOps raises on purpose. ``str(error)`` is fit to be shown to a user."""

    code: ClassVar[str] = "error"


class InvalidInputError(FlopsError):
    """The caller sent something that cannot work: change the request."""

    code = "invalid-input"


class NotFoundError(FlopsError):
    """The named object does not exist: check the name."""

    code = "not-found"


class ConflictError(FlopsError):
    """The request does not fit the object's present state: look at it, then decide."""

    code = "conflict"


class UnauthorizedError(FlopsError):
    """The caller did not prove who it is, or may not do this: bring the right token."""

    code = "unauthorized"


class ForbiddenError(UnauthorizedError):
    """The caller is known, and may not do this: ask somebody who may."""

    code = "forbidden"


class TooManyRequestsError(FlopsError):
    """The caller asks too often: wait, then ask again."""

    code = "too-many-requests"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(FlopsError):
    """Something needed is away for now: try again later, nothing else has to change."""

    code = "unavailable"


class FailedError(FlopsError):
    """The work itself failed and would fail again: mend the cause first."""

    code = "failed"


BY_CODE: Mapping[str, type[FlopsError]] = {
    kind.code: kind
    for kind in (
        InvalidInputError,
        NotFoundError,
        ConflictError,
        UnauthorizedError,
        ForbiddenError,
        TooManyRequestsError,
        UnavailableError,
        FailedError,
    )
}
"""For whoever receives an error's code from another process and raises it again."""
