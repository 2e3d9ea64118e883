"""What is printed and how: consoles, JSON, tables, errors. Text from outside cannot steer the terminal."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flops.core.errors import FlopsError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WIDTH_OF_A_PIPE = 200


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr; where it is no terminal, long lines stay whole."""
    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and not os.environ.get("COLUMNS")
    return Console(stderr=stderr, highlight=False, markup=False, width=_WIDTH_OF_A_PIPE if wide else None)


def clean(text: object) -> str:
    """Text from a learner, a log or a repository without terminal commands."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", str(text)))


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: object) -> None:
    """One line of a JSON stream on stdout, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: FlopsError, *, as_json: bool) -> None:
    """Tell an error on stderr; no traceback, it is the user's to act on."""
    if as_json:
        sys.stderr.write(json.dumps({"code": error.code, "detail": str(error)}) + "\n")
        return
    text = Text("error: ", style="bold red")
    text.append(clean(error), style="not bold red")
    err = console(stderr=True)
    err.print(text, soft_wrap=not err.is_terminal)


def note(text: str) -> None:
    """A remark beside the result, on stderr so that it never mixes with it."""
    err = console(stderr=True)
    err.print(Text(clean(text), style="dim"), soft_wrap=not err.is_terminal)


def say(*parts: str | tuple[str, str]) -> None:
    """A line on stdout; parts are text or (text, style)."""
    console().print(Text.assemble(*parts), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], empty: str) -> None:
    """A plain table: no lines, headings in bold; numbers (columns starting with '#') to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(
            column.removeprefix("#"),
            justify="right" if column.startswith("#") else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    count = 0
    for count, row in enumerate(rows, start=1):  # noqa: B007 - counted, not used
        table.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in row))
    if count:
        console().print(table)
    else:
        note(empty)


_STATE_STYLES = {
    "finished": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "stopping": "yellow",
    "pausing": "yellow",
    "paused": "yellow",
    "connected": "green",
    "left": "yellow",
    "ejected": "bold red",
    "training": "cyan",
}


def state_text(state: str) -> Text:
    return Text(clean(state), style=_STATE_STYLES.get(state, ""))


def duration(seconds: float) -> str:
    """Seconds as people say them: ``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def age(then: float | None) -> str:
    """How long ago something was."""
    if then is None:
        return "-"
    seconds = max(time.time() - then, 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def size(count: float | None) -> str:
    """Bytes in powers of ten."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"


def number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
