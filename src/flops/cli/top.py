"""Live: what nodes and services use. The table, its order, and the keys that change it."""

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flops.cli.output import JsonFlag, clean, console, print_json, print_json_line, size, state_text
from flops.core.errors import FlopsError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from flops.client import Client

SORTS = {"c": "cpu", "m": "memory", "r": "received", "s": "sent", "p": "project", "n": "name"}
_FIELDS = {
    "cpu": "cpu_percent",
    "memory": "memory_bytes",
    "received": "received_bytes_per_s",
    "sent": "sent_bytes_per_s",
}
_WIDE, _WIDER, _WIDEST = 100, 115, 140
_LEAST_S = 0.2


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Federated training")(top)


@dataclass(frozen=True)
class _Wish:
    """What is to be seen, and how."""

    sort: str = "cpu"
    project: str | None = None
    rows: int | None = None
    """So many services at most; None: all."""


def top(
    project: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only this project's services.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="By cpu, memory, received, sent, project or name; keys change it.")
    ] = "cpu",
    interval: Annotated[float, typer.Option(min=_LEAST_S, max=60.0, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and print.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show live what nodes and services use: processor, memory, bytes.

    Keys: c m r s p n sort by CPU, memory, received, sent, project, name; q ends.
    """
    from flops.cli.session import manager

    if sort not in SORTS.values():
        raise typer.BadParameter(f"'{sort}' is none of {', '.join(SORTS.values())}", param_hint="--sort")
    wish = _Wish(sort, project)
    with manager() as client, suppress(KeyboardInterrupt):
        if once or (not as_json and not console().is_terminal):
            seen = _look(client, wish)
            print_json(seen) if as_json else console().print(table(seen, wish, console().width))
        elif as_json:
            while True:
                print_json_line(_look(client, wish))
                time.sleep(interval)
        else:
            _watch(client, wish, interval)


def _look(client: "Client", wish: _Wish) -> dict[str, Any]:
    seen: dict[str, Any] = dict(client.get_top())
    if wish.project is not None:
        seen["services"] = [one for one in seen["services"] if one["project"] == wish.project]
    seen["services"] = _in_order(seen["services"], wish.sort)
    return seen


def _in_order(services: Sequence[Any], sort: str) -> list[Any]:
    if sort in _FIELDS:
        return sorted(services, key=lambda one: (-(one[_FIELDS[sort]] or 0), one["name"]))
    return sorted(services, key=lambda one: (one[sort], one["name"]))


def _watch(client: "Client", wish: _Wish, interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    out = console()
    with _keys() as key, Live(console=out, screen=True, auto_refresh=False, transient=True) as live:
        while True:
            shown: RenderableType
            try:
                seen = _look(client, wish)
                shown = table(seen, replace(wish, rows=out.height), out.width)
            except FlopsError as error:
                shown = Text(f"{clean(error)} - looking again", style="yellow")
            live.update(shown, refresh=True)
            pressed = key(interval)
            if pressed in ("q", "\x1b"):
                return
            if pressed in SORTS:
                wish = replace(wish, sort=SORTS[pressed])


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys one by one, without Enter; each is waited for so many seconds."""
    if not sys.stdin.isatty():

        def none(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield none
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)

    def wait(seconds: float) -> str:
        ready, _, _ = select.select([terminal], [], [], seconds)
        return os.read(terminal, 64).decode(errors="replace")[:1] if ready else ""

    try:
        yield wait
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def table(seen: dict[str, Any], wish: _Wish, width: int) -> "RenderableType":
    """Nodes in a line each, then services; as many columns as fit."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    services = seen["services"]
    parts: list[RenderableType] = [_totals(seen, wish)]
    if seen["away"]:
        parts.append(Text(f"! {clean(seen['away'])}", style="yellow"))
    nodes = Table.grid(padding=(0, 2))
    for node in seen["nodes"]:
        nodes.add_row(*_node(node))
    parts += [nodes, Text("")]
    many_nodes = len(seen["nodes"]) > 1
    columns = [
        one
        for one in _COLUMNS
        if width >= one.least_width and (one.title != "NODE" or many_nodes or width >= _WIDEST)
    ]
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), expand=False)
    for column in columns:
        grid.add_column(
            f"{column.title}{'▾' if column.sort == wish.sort else ''}",
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=None,
        )
    rows = services
    if wish.rows is not None:
        room = max(1, wish.rows - len(seen["nodes"]) - 5 - bool(seen["away"]))
        rows = services if len(services) <= room else services[: room - 1]
    for one in rows:
        grid.add_row(*(column.cell(one) for column in columns))
    parts.append(
        grid if services else Text("nothing runs - start something with 'flops run REPO'", style="dim")
    )
    if len(rows) < len(services):
        parts.append(Text(f"and {len(services) - len(rows)} more", style="dim"))
    return Group(*parts)


def _totals(seen: dict[str, Any], wish: _Wish) -> "Text":
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(seen["time"]))
    shown = seen["services"]
    text = Text(f"{clock}  ", style="dim")
    text.append(f"{len(shown)} service{'' if len(shown) == 1 else 's'}", style="bold")
    for name, field, form in (
        ("CPU", "cpu_percent", _percent),
        ("memory", "memory_bytes", size),
        ("in", "received_bytes_per_s", _rate),
        ("out", "sent_bytes_per_s", _rate),
    ):
        known = [one[field] for one in shown if one[field] is not None]
        text.append(f"   {name} ", style="dim")
        text.append(form(sum(known)) if known else "-", style="bold")
    return text


def _node(node: dict[str, Any]) -> "list[Text]":
    from rich.text import Text

    name = Text(clean(node["name"]), style="cyan" if node["ready"] else "yellow")
    if not node["ready"]:
        name.append(" (away)")
    cpu, memory = node["cpu_percent"], node["memory_bytes"]
    share = None if cpu is None else cpu / (100 * max(1, node["cpus"]))
    filled = None if memory is None else memory / max(1, node["capacity_bytes"])
    return [
        name,
        _bar(share),
        Text(f"{_percent(cpu)} of {node['cpus']} CPUs"),
        _bar(filled),
        Text(f"{size(memory)} of {size(node['capacity_bytes'])}"),
    ]


def _bar(share: float | None, width: int = 10) -> "Text":
    from rich.text import Text

    if share is None:
        return Text("-" * width, style="dim")
    full = min(width, round(share * width + (0.4 if share > 0 else 0)))
    style = "red" if share > 0.9 else "yellow" if share > 0.7 else "green"
    return Text("█" * full, style=style).append("░" * (width - full), style="dim")


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[dict[str, Any]], "Text"]
    right: bool = False
    least_width: int = 0
    sort: str = ""


def _plain(value: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(clean(value), style=style)


def _name(one: dict[str, Any]) -> "Text":
    short = one["name"].removeprefix(f"{one['project']}-")
    text = _plain(short)
    if one["cluster"]:
        text.append(f" {clean(one['cluster'])}", style="dim")
    return text


def _round(one: dict[str, Any]) -> "Text":
    return _plain("" if one["round"] is None else f"{one['round']}/{one['rounds']}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}%" if value >= 100 else f"{value:.1f}%"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{size(value)}/s"


_COLUMNS = (
    _Column("NODE", lambda one: _plain(one["node"], "cyan"), least_width=_WIDE),
    _Column("PROJECT", lambda one: _plain(one["project"]), sort="project"),
    _Column("SERVICE", _name, sort="name"),
    _Column("ROLE", lambda one: _plain(one["role"], "dim"), least_width=_WIDEST),
    _Column("STATE", lambda one: state_text(one["state"])),
    _Column("CPU", lambda one: _plain(_percent(one["cpu_percent"])), right=True, sort="cpu"),
    _Column("MEM", lambda one: _plain(size(one["memory_bytes"])), right=True, sort="memory"),
    _Column("IN", lambda one: _plain(_rate(one["received_bytes_per_s"])), right=True, sort="received"),
    _Column("OUT", lambda one: _plain(_rate(one["sent_bytes_per_s"])), right=True, sort="sent"),
    _Column("TOTAL IN", lambda one: _plain(size(one["received_bytes"])), right=True, least_width=_WIDER),
    _Column("TOTAL OUT", lambda one: _plain(size(one["sent_bytes"])), right=True, least_width=_WIDER),
    _Column("THR", lambda one: _plain(str(one["threads"] or "-")), right=True, least_width=_WIDE),
    _Column("RST", lambda one: _plain(str(one["restarts"])), right=True, least_width=_WIDE),
    _Column("ROUND", _round, right=True),
)
