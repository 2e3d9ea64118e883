"""What went wrong in user code, as a report for the agent: where, what, and the user's own frames."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Dict, Optional, Set

MAX_LINES = 20
MAX_MESSAGE = 2000

_PACKAGES = Path(__file__).absolute().parent.parent
_OWN = tuple(str(_PACKAGES / name) + os.sep for name in ("flops_worker", "flops_utils"))


class ContractError(Exception):
    """The repository does not keep to its contract with FLOps; the text says what to change."""


def report(where: str, error: BaseException, code: str) -> Dict[str, Any]:
    """Describe an exception of user code, and write its traceback to the log.

    Args:
        where: the step of the contract that was running, such as ``fit_model``.
        code: the checkout, for the location in the user's own files.
    """
    summary = traceback.TracebackException(type(error), error, error.__traceback__)
    _drop_own_frames(summary, set())
    lines = "".join(summary.format()).rstrip().splitlines()
    with contextlib.suppress(BaseException):  # user code may have closed or replaced it
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
    return {
        "ok": False,
        "where": where,
        "type": type(error).__name__,
        "contract": isinstance(error, ContractError),
        "message": _message(error)[:MAX_MESSAGE],
        "location": _location(summary, code),
        "traceback": lines[-MAX_LINES:],
    }


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"the code called sys.exit({'' if error.code is None else repr(error.code)})"
    try:
        return str(error)
    except BaseException as second:
        return f"(its text cannot be made: {type(second).__name__})"


def _drop_own_frames(summary: traceback.TracebackException, seen: Set[int]) -> None:
    if id(summary) in seen:
        return
    seen.add(id(summary))
    summary.stack = traceback.StackSummary.from_list(
        [
            frame
            for frame in summary.stack
            if not frame.filename.startswith(_OWN) and not frame.filename.startswith("<frozen importlib")
        ]
    )
    for other in (summary.__cause__, summary.__context__):
        if other is not None:
            _drop_own_frames(other, seen)


def _location(summary: traceback.TracebackException, code: str) -> Optional[str]:
    """The last line of the user's own files that was reached, as ``file:line``."""
    places = [(frame.filename, frame.lineno) for frame in summary.stack]
    if summary.exc_type is not None and issubclass(summary.exc_type, SyntaxError):
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            places.append((str(summary.filename), int(summary.lineno or 0)))
    for filename, line in reversed(places):
        if filename.startswith(code + os.sep):
            return f"{os.path.relpath(filename, code)}:{line}"
    return None
