"""Why a request was refused or failed: a status and one short sentence that names the field."""

from typing import ClassVar

from flops.core.errors import FailedError, FlopsError, InvalidInputError, UnavailableError


class RefusedError(InvalidInputError):
    """The request cannot be answered as it is; `status` is HTTP's word for why."""

    code = "scoring-refused"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ModelFailedError(FailedError):
    """The model raised on this input; the same request fails again."""

    code = "model-failed"
    status: ClassVar[int] = 400
    """As MLflow's server says it: mostly it is the input that the model cannot take."""


class PredictorAwayError(UnavailableError):
    """No predictor can answer now: it died, is being started, or everything is taken."""

    code = "predictor-away"
    status: ClassVar[int] = 503


class TooSlowError(FlopsError):
    """No answer within the time of one request."""

    code = "too-slow"
    status: ClassVar[int] = 504
