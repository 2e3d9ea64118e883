"""How log lines look to people: time, where, what was said; what others printed, as it is."""

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from flops.cli.output import clean, console, say
from flops.telemetry import Line, parse

_STYLES = {"warning": "yellow", "error": "bold red", "critical": "bold red"}


def show_by_service(logs: Mapping[str, str]) -> None:
    """Every service's lines in the order in which it wrote them."""
    for name, text in logs.items():
        if not text.strip():
            continue
        if len(logs) > 1:
            say((f"==> {clean(name)}", "bold"))
        for raw in text.splitlines():
            line = parse(raw)
            if line is None:
                console().out(clean(raw))
            else:
                _show(line, "")


def show_by_time(logs: Mapping[str, str], project: str) -> None:
    """The log lines of all services together, in the order of their times."""
    lines = sorted(_named(logs, project), key=lambda item: item[1].time)
    width = max((len(name) for name, _ in lines), default=0)
    for name, line in lines:
        _show(line, f"{name.ljust(width)}  ")


def _named(logs: Mapping[str, str], project: str) -> Iterator[tuple[str, Line]]:
    for name, text in logs.items():
        for raw in text.splitlines():
            if (line := parse(raw)) is not None:
                yield clean(name.removeprefix(f"{project}-")), line


def _show(line: Line, where: str) -> None:
    style = _STYLES.get(line.level, "")
    level = f"{clean(line.level)}: " if style else ""
    say((f"{_clock(line.time)}  ", "dim"), (where, "cyan"), (level, style), clean(line.message))
    if line.traceback:
        console().out(clean(line.traceback))


def _clock(written: str) -> str:
    """The time of day here, to a thousandth of a second."""
    try:
        moment = datetime.strptime(written, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return clean(written)[:24]
    local = time.localtime(moment.timestamp())
    return time.strftime("%H:%M:%S", local) + f".{moment.microsecond // 1000:03d}"
