"""Watching a project until it rests: lines that stay, and below them on a terminal what happens now."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from flops.cli.follow import Away, Back, follow
from flops.cli.lines import Lines, result
from flops.cli.output import clean, console, duration, note, print_json_line
from flops.cli.progress import Progress
from flops.client import Client
from flops.client.events import ProjectEvent
from flops.core.errors import UnavailableError

_WORDS = {
    "submitted": "waiting for its turn",
    "preparing": "preparing",
    "deploying": "starting the services",
    "training": "training",
    "packaging": "packaging the model",
    "stopping": "stopping",
    "pausing": "pausing",
}
_REDRAWS_PER_SECOND = 8
_MOST_CLUSTERS = 8


class Status:
    """The moving part at the bottom of the screen; drawn anew several times a second."""

    def __init__(self, progress: Progress, now: Callable[[], float] = time.time) -> None:
        self._progress = progress
        self._now = now
        self._spinner = Spinner("dots", style="cyan")
        self.away: str | None = None

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        progress = self._progress
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=1)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        if self.away is not None:
            text = Text("manager is away, waiting", style="yellow")
            text.append("  (the project goes on when it is back: 'flops up')", style="dim")
            grid.add_row(self._spinner, text)
            yield grid
            return
        for step in progress.running.values():
            text = Text(f"{clean(step.name)} ")
            text.append(f"{duration(self._now() - step.started)} ", style="cyan")
            text.append(clean(step.message).replace("\n", " "), style="dim")
            grid.add_row(self._spinner, text)
        if not progress.running:
            grid.add_row(self._spinner, Text(self._now_happening()))
        yield grid
        if progress.state == "training" and progress.clusters:
            yield self._clusters()
        if progress.state == "training" and progress.round:
            yield self._bar(options.max_width)

    def _now_happening(self) -> str:
        progress = self._progress
        if progress.waiting_for is not None:
            words = f"waiting for {progress.members}: "
            words += f"{len(progress.connected)} of {progress.waiting_for} connected"
            return words + (f", at most {duration(progress.deadline_s)}" if progress.deadline_s else "")
        if progress.state == "training" and progress.round_started is not None:
            words = f"round {progress.round}"
            if progress.mode == "hierarchical":
                words = f"cycle {progress.round} of {progress.rounds_total}"
            if progress.mode == "asynchronous":
                words += f": {progress.answered} updates so far, "
            else:
                words += f": {progress.answered} of {progress.cohort} {progress.members} have answered, "
            return words + duration(self._now() - progress.round_started)
        return _WORDS.get(progress.state, progress.state)

    def _clusters(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        clusters = sorted(self._progress.clusters.items())
        outer = {name.rpartition("/")[0] for name, _ in clusters}
        for name, done in clusters[:_MOST_CLUSTERS]:
            members = "clusters" if name in outer else "learners"
            grid.add_row(
                Text(f"  {clean(name)}"),
                Text(f"round {done.number} of {done.rounds}", style="dim"),
                Text(f"{done.participants} of {done.cohort} {members}", style="dim"),
                Text(duration(done.duration_s), style="dim"),
            )
        if len(clusters) > _MOST_CLUSTERS:
            grid.add_row(Text(f"  and {len(clusters) - _MOST_CLUSTERS} more", style="dim"))
        return grid

    def _bar(self, width: int) -> Table:
        progress = self._progress
        done = progress.last_round.number if progress.last_round else 0
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=progress.rounds_total, completed=done, width=max(10, min(40, width - 45)))
        remaining = progress.remaining_s
        left = f"about {duration(remaining)} left" if remaining else ""
        grid.add_row(
            "  ", bar, Text(f"{done} of {progress.rounds_total} {progress.unit}s"), Text(left, style="dim")
        )
        return grid


def watch(
    project: Mapping[str, Any],
    find: Callable[[], Client | None],
    *,
    as_json: bool,
    after: int = 0,
) -> int:
    """Show a project until it ends or is paused, or until Ctrl-C, which leaves the project alone.

    Returns:
        The exit code: 0 if the project finished or was left running, 1 if it failed, was stopped or paused.
    """
    name = str(project["id"])
    try:
        return (_as_json if as_json else _as_text)(project, follow(name, find, after=after), find)
    except KeyboardInterrupt:
        note(f"left {name} running - come back with 'flops attach {name}', end it with 'flops stop {name}'")
        return 0


def _as_json(
    project: Mapping[str, Any],
    events: Iterator[ProjectEvent | Away | Back],
    find: Callable[[], Client | None],
) -> int:
    for event in events:
        if isinstance(event, ProjectEvent):
            print_json_line(event.json)
        elif isinstance(event, Away):
            note("manager is away, waiting")
    final = _final(project, find)
    print_json_line({"kind": "project", **final})
    return 0 if final["state"] == "finished" else 1


def _as_text(
    project: Mapping[str, Any],
    events: Iterator[ProjectEvent | Away | Back],
    find: Callable[[], Client | None],
) -> int:
    out = console()
    training = (project.get("spec") or {}).get("training") or {}
    progress = Progress(
        rounds_total=int(project.get("rounds_total") or 0),
        mode=str(training.get("mode") or "classic"),
    )
    lines = Lines(progress, verbose=not out.is_terminal)
    status = Status(progress)
    for line in lines.heading(project):
        out.print(line, soft_wrap=not out.is_terminal)
    with _drawn(out, status):
        for event in events:
            if isinstance(event, Away):
                status.away = event.reason
                if not out.is_terminal:
                    out.print("  ! manager is away, waiting", soft_wrap=True)
            elif isinstance(event, Back):
                status.away = None
                out.print(Text("  ! manager is back", style="yellow"), soft_wrap=True)
            else:
                progress.apply(event)
                for line in lines.lines(event):
                    out.print(line, soft_wrap=not out.is_terminal)
    final = _final(project, find)
    for line in result(final, progress):
        out.print(line, soft_wrap=not out.is_terminal)
    return 0 if final["state"] == "finished" else 1


@contextmanager
def _drawn(out: Console, status: Status) -> Iterator[None]:
    if not out.is_terminal:
        yield
        return
    with Live(status, console=out, refresh_per_second=_REDRAWS_PER_SECOND, transient=True):
        yield


def _final(project: Mapping[str, Any], find: Callable[[], Client | None]) -> Mapping[str, Any]:
    client = find()
    if client is None:
        raise UnavailableError(
            f"project {project['id']} has ended, but the manager is away - see 'flops show {project['id']}'"
        )
    with client:
        return client.get_project(str(project["id"]))
