"""What data server and client say to each other, over Arrow Flight.

==============  =====================================================================================
do_put          descriptor command ``{"tags", "site", "allow_metrics", "labels"}``; then batches; then
                metadata ``{"rows": n}`` as the last message: only that completes a put, because to the
                server a client that was killed looks like one that is done. Answered by the fragment's
                JSON.
do_get          ticket ``{"id"}`` or ``{"tags", "site"}``
action list     ``{"tags", "site"}``, one result per fragment
action drop     ``{"id"}`` or ``{"tags", "site"}``, one result per dropped fragment
histogram       action; ``{"tags", "site", "epsilon"}``, one result ``{"counts"}``
action ping     ``{"fragments", "size_bytes"}``
==============  =====================================================================================

Every call carries ``authorization: Bearer TOKEN``. Errors carry ``{"code", "message"}`` as Flight's extra
info.
"""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import flight

from flops.core.errors import (
    BY_CODE,
    FailedError,
    FlopsError,
    InvalidInputError,
    UnauthorizedError,
    UnavailableError,
)

MAX_COMMAND_BYTES = 1 << 20
"""Holds 100 tags of 256 characters, each escaped."""

_UNAVAILABLE = "Flight returned unavailable error, with message: "


def encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def decode(data: bytes, known: frozenset[str]) -> dict[str, Any]:
    """Read a JSON object that may come from anywhere.

    Raises:
        InvalidInputError: too long, no object, or with other keys than the ``known`` ones.
    """
    if len(data) > MAX_COMMAND_BYTES:
        raise InvalidInputError(
            f"a request of {len(data)} bytes is over the limit of {MAX_COMMAND_BYTES} - shorten it"
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError("a request is not JSON - use flops.data.DataClient") from error
    if not isinstance(value, dict) or not value.keys() <= known:
        raise InvalidInputError(
            f"a request is not an object with keys of {', '.join(sorted(known))} - "
            "use the same FLOps version on both sides"
        )
    return value


def answered(data: bytes, location: str) -> dict[str, Any]:
    """The JSON object in an answer of the server.

    Raises:
        FailedError: it is none.
    """
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise FailedError(
            f"the data server at {location} gave an answer that is no JSON object - "
            "use the same FLOps version on both sides"
        )
    return value


def as_flight_error(error: FlopsError) -> flight.FlightError:
    """An error on its way to the client."""
    kind = (
        flight.FlightUnauthenticatedError
        if isinstance(error, UnauthorizedError)
        else flight.FlightServerError
    )
    return kind(error.code, extra_info=encode({"code": error.code, "message": str(error)}))


@contextmanager
def translated(location: str) -> Iterator[None]:
    """Raise what Flight raises as children of `FlopsError`; for the client's side."""
    try:
        yield
    except flight.FlightError as error:
        raise _from_flight(error, location) from error
    except pa.ArrowException as error:
        raise FailedError(
            f"the data server at {location} could not be understood: {_first_line(error)} - "
            "use the same FLOps version on both sides"
        ) from error


def read_token(path: Path) -> str:
    """Read a bearer token from a file that only its owner may read.

    Raises:
        InvalidInputError: the file is missing, open to others, or holds no token.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4097)
    except OSError as error:
        raise InvalidInputError(
            f"the token file '{path}' cannot be read ({error.strerror}) - check its path"
        ) from error
    if stat.S_IMODE(mode) & 0o077:
        raise InvalidInputError(f"others may read the token file '{path}' - run 'chmod 600' on it")
    return check_token(text.decode("latin-1").strip(), f"the token file '{path}' holds no token")


def check_token(token: str, what: str = "that is no token") -> str:
    """The token, if it can be one.

    Raises:
        InvalidInputError: it cannot; `what` is the beginning of the text.
    """
    if not 16 <= len(token) <= 4096 or not token.isascii() or not token.isprintable():
        raise InvalidInputError(f"{what} - write 16 to 4096 printable ASCII characters")
    return token


def _from_flight(error: flight.FlightError, location: str) -> FlopsError:
    try:
        details = json.loads(error.extra_info)
        return BY_CODE[details["code"]](str(details["message"]))
    except (ValueError, KeyError, TypeError):
        pass  # not an answer of the data server itself: judged by its class below
    if isinstance(error, flight.FlightUnavailableError):
        return UnavailableError(
            f"no data server answers at {location} - start it with 'flops up', or check the "
            f"location and its certificate ({_first_line(error)})"
        )
    if isinstance(error, flight.FlightTimedOutError):
        return UnavailableError(
            f"the data server at {location} did not answer in time - try again, or look at its log"
        )
    if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
        return UnauthorizedError(f"the data server at {location} refused the token - check it")
    if isinstance(error, flight.FlightCancelledError):
        return UnavailableError(f"the call to the data server at {location} was cut - try again")
    return FailedError(f"the data server at {location} failed: {_first_line(error)} - look at its log")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removeprefix(_UNAVAILABLE)[:300]
