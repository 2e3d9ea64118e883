"""Log lines: one JSON object each, written by every program of FLOps, and read again where people look.

``time``, ``level``, ``logger``, ``message``; the facts of the moment (`flops.telemetry.context.FIELDS`) where
they are known; ``traceback`` where there is one. What looks like a credential is left out, whoever logged it.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flops.core.tokens import BEGINNING
from flops.telemetry.context import FIELDS, always, current

MAX_MESSAGE_CHARS = 16_384
_MAX_LINE_CHARS = 200_000
_QUOTED_LINES = 15
_HIDDEN = "***"
# Users and passwords of addresses, our tokens, and whatever a header calls a bearer's.
_CREDENTIALS = (
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@'\"]+@"), rf"\1{_HIDDEN}@"),
    (re.compile(rf"\b({BEGINNING})[A-Za-z0-9_-]{{20,}}"), rf"\1{_HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{16,}"), rf"\1\2{_HIDDEN}"),
    (
        re.compile(r"(?i)([?&](?:token|access_token|password|secret|key|sig|signature)=)[^\s&'\"]+"),
        rf"\1{_HIDDEN}",
    ),
)


class JsonLines(logging.Formatter):
    """Formats records as such lines."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": _program() if record.name == "__main__" else record.name,
            "message": _bounded(without_credentials(record.getMessage())),
        }
        facts = current()
        line |= {name: facts[name] for name in FIELDS if name in facts}
        if record.exc_info:
            line["traceback"] = _bounded(without_credentials(self.formatException(record.exc_info)))
        return json.dumps(line)  # ASCII: a line never fails for the terminal it goes to


def log_lines(service: str, **facts: str | int | None) -> None:
    """Let this process log such lines to standard error, with these facts in all of them."""
    always(service=service, **facts)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def without_credentials(text: str) -> str:
    """A text without what looks like users and passwords of addresses, or like tokens."""
    for pattern, shown in _CREDENTIALS:
        text = pattern.sub(shown, text)
    return text


@dataclass(frozen=True)
class Line:
    """One line as it was written."""

    time: str
    level: str
    message: str
    traceback: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def parse(text: str) -> Line | None:
    """Read a line; None: it is somebody else's, such as what a user's code printed."""
    if not text.startswith('{"time"') or len(text) > _MAX_LINE_CHARS:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(k), str) for k in ("time", "message")):
        return None
    facts = {name: str(found[name]) for name in FIELDS if isinstance(found.get(name), str | int)}
    return Line(
        found["time"], str(found.get("level", "")), found["message"], str(found.get("traceback", "")), facts
    )


def said(text: str) -> str:
    """What a line says: the message of one of ours, any other as it is."""
    line = parse(text)
    return text if line is None else line.message


def readable(text: str) -> str:
    """A line for people: time of day (UTC), level where it is worth a word, message, traceback."""
    line = parse(text)
    if line is None:
        return text
    level = "" if line.level in ("info", "debug") else f"{line.level}: "
    traceback = f"\n{line.traceback}" if line.traceback else ""
    return f"{line.time[11:23]}  {level}{line.message}{traceback}"


def belongs(text: str, **facts: str) -> bool:
    """Whether a line of ours carries these facts."""
    line = parse(text)
    return line is not None and all(line.facts.get(name) == value for name, value in facts.items())


def last_lines(log: Path, start: int) -> str:
    """The end of what was written to a log behind an offset, indented, for an error that quotes it."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_QUOTED_LINES:]) or "  (nothing)"


def _program() -> str:
    """The name of the module that is this process's program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else "__main__"


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 3] + "..."
