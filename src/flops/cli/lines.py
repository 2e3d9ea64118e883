"""What stays on the screen: a project's events as lines of text, the same for terminals and pipes."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from flops.cli.output import clean, duration, number, percent, size
from flops.cli.progress import Progress, how_many
from flops.client.events import RESTING, ProjectEvent
from flops.core.events import EventKind

_STEP_WIDTH = 18
_COLUMNS = (("round", 9), ("loss", 10), ("accuracy", 10), ("learners", 10), ("time", 11))


class Lines:
    """Turns events into lines; remembers only which headings it has printed.

    Args:
        progress: already holds the event that is being told.
        verbose: tell sub-steps too (where no live status shows them).
    """

    def __init__(self, progress: Progress, *, verbose: bool) -> None:
        self._progress = progress
        self._verbose = verbose
        self._rounds_headed = False
        self._rested: str | None = None

    def heading(self, project: Mapping[str, Any]) -> Iterator[Text]:
        text = Text(f"{project['id']}", style="bold cyan")
        text.append(f"  {clean(project.get('name') or '')}", style="bold")
        source = project.get("source")
        if source and source != project.get("name"):
            text.append(f"  {clean(source)}", style="dim")
        yield text

    def lines(self, event: ProjectEvent) -> Iterator[Text]:
        data = event.data
        match event.kind:
            case EventKind.PROJECT_STATE:
                yield from self._turn(str(event.state), data)
            case EventKind.STEP_FINISHED:
                yield self._step(data)
            case EventKind.STEP_PROGRESS if self._verbose:
                yield Text(f"    {clean(data.get('step'))}: {clean(data.get('message'))}", "dim")
            case EventKind.WARNING:
                yield _attention(f"warning: {clean(data.get('message'))}")
            case EventKind.TRAINING_WAITING if self._verbose and "cluster" not in data:
                expected = data.get("expected") or data.get("needed")
                members = self._progress.members
                yield Text(
                    f"    waiting for {members}: {data.get('connected')} of {expected} connected", "dim"
                )
            case EventKind.CLUSTER_ROUND:
                if self._verbose:
                    yield Text(f"    {_cluster_round(data, self._progress)}", "dim")
                for learner, reason in (data.get("left_out") or {}).items():
                    yield _attention(
                        f"cluster {clean(data.get('cluster'))}, round {data.get('round')}: {clean(learner)} "
                        f"left out - {clean(reason)}"
                    )
            case EventKind.CLUSTERS_FORMED:
                trips = data.get("round_trip_ms") or {}
                for cluster, learners in (data.get("clusters") or {}).items():
                    known = [trips[name] for name in learners if name in trips]
                    away = f", at most {max(known):.2g} ms away" if known else ""
                    members = f"{len(learners)} learner{'s' if len(learners) != 1 else ''}"
                    yield Text(f"    cluster {clean(cluster)}: {members}{away}", "dim")
            case EventKind.CLUSTER_LEFT if not self._progress.training_over:
                reason = clean(data.get("reason") or "no reason given")
                yield _attention(f"cluster {clean(data.get('cluster'))} left - {reason}")
            case EventKind.LEARNER_EJECTED:
                yield _attention(f"{clean(data.get('learner'))} is ejected - {clean(data.get('reason'))}")
            case EventKind.LEARNER_LEFT if not self._progress.training_over and (
                data.get("learner") not in self._progress.ejected
            ):
                reason = clean(data.get("reason") or "no reason given")
                yield _attention(f"learner {clean(data.get('learner'))} left - {reason}")
            case EventKind.UPDATE_REFUSED:
                where = f"cluster {clean(data['cluster'])}, " if "cluster" in data else ""
                who = f"{where}round {data.get('round')}: update of {clean(data.get('learner'))}"
                if not data.get("late"):  # that it was left out stands with its round
                    yield _attention(f"{who} refused - {clean(data.get('reason'))}")
                elif self._verbose:
                    yield Text(f"    {who} came too late", "dim")
            case EventKind.ROUND_FINISHED if "cluster" not in data:
                yield from self._round()
            case EventKind.TRAINING_FAILED:
                yield Text(f"  x training failed: {clean(data.get('reason'))}", "red")

    def _turn(self, state: str, data: Mapping[str, Any]) -> Iterator[Text]:
        """A rest, and its end."""
        if self._rested is not None and state not in ("stopping", "stopped"):
            resumed = self._rested == "paused" and state != "paused"
            yield Text("  resumed" if resumed else f"  {clean(data.get('reason'))}", "yellow")
        elif state == "paused":
            yield Text("  paused", "yellow")
        self._rested = state if state in RESTING else None

    def _step(self, data: Mapping[str, Any]) -> Text:
        text = Text("  \N{CHECK MARK} ", style="green")
        text.append(clean(data.get("step")).ljust(_STEP_WIDTH), style="default")
        text.append(duration(float(data.get("duration_s") or 0.0)).rjust(10), style="default")
        if data.get("initial"):
            text.append(f"   parameters of {clean(data['initial'])}", style="dim")
        return text

    def _round(self) -> Iterator[Text]:
        done = self._progress.last_round
        if done is None:
            return
        if not self._rounds_headed:
            self._rounds_headed = True
            headings = {"round": self._progress.unit, "learners": self._progress.members}
            yield Text(
                "  " + "".join(headings.get(name, name).rjust(width) for name, width in _COLUMNS), "bold"
            )
        waits_for_nobody = self._progress.mode == "asynchronous"
        cells = (
            f"{done.number}/{self._progress.rounds_total}",
            number(done.metrics.get("loss")),
            percent(done.metrics.get("accuracy")),
            str(done.participants) if waits_for_nobody else f"{done.participants}/{done.cohort}",
            duration(done.duration_s) if done.duration_s >= 1 else f"{1000 * done.duration_s:.0f} ms",
        )
        text = Text("  ")
        for cell, (name, width) in zip(cells, _COLUMNS, strict=True):
            short = name == "learners" and done.participants + done.not_needed < done.cohort
            short = short and not waits_for_nobody
            text.append(cell.rjust(width), style="yellow" if short else "default")
        beside = []
        if done.bytes_up is not None:
            beside.append(f"{size(done.bytes_down)} down, {size(done.bytes_up)} up")
        if done.not_needed:
            beside.append(f"{done.not_needed} not needed")
        if done.version is not None and done.staleness:
            mean, worst = done.staleness.get("mean", 0.0), done.staleness.get("max", 0)
            beside.append(f"version {done.version}, staleness {mean:.1f}, at most {worst:.0f}")
        if beside:
            text.append("   " + ", ".join(beside), style="dim")
        yield text
        for learner, reason in done.left_out.items():
            unit = self._progress.unit
            yield _attention(f"{unit} {done.number}: {clean(learner)} left out - {clean(reason)}")


def _cluster_round(data: Mapping[str, Any], progress: Progress) -> str:
    path = str(data.get("cluster"))
    members = "clusters" if any(name.startswith(f"{path}/") for name in progress.clusters) else "learners"
    trained, cohort = how_many(data.get("participants")), how_many(data.get("cohort"))
    return (
        f"cluster {clean(path)}: round {data.get('round')} of {data.get('rounds')}, "
        f"{trained} of {cohort} {members}, {duration(float(data.get('duration_s') or 0))}"
    )


def _attention(text: str) -> Text:
    return Text(f"  ! {text}", style="yellow")


def result(project: Mapping[str, Any], progress: Progress) -> Iterator[Text]:
    """The end of a project: what came out, where it is, what to do next."""
    name, state = project["id"], project["state"]
    took = ""
    if progress.took_s is not None:
        took = f" in {duration(progress.took_s)}"
    yield Text()
    if state != "finished":
        text = Text(state, style="bold red" if state == "failed" else "bold yellow")
        text.append(took, style="default")
        if state == "paused":
            text.append(
                f" after {project['rounds_done']} of {project['rounds_total']} {progress.unit}s", "default"
            )
            yield text
            yield from _next(
                ((f"flops resume {name}", "go on from there"), (f"flops stop {name}", "end it instead"))
            )
            return
        if project.get("reason"):
            text.append(f": {clean(project['reason'])}", style="default")
        yield text
        yield from _next(
            ((f"flops logs {name}", "what its services said"), (f"flops show {name}", "all about it"))
        )
        return
    metrics = progress.metrics or project.get("metrics") or {}
    text = Text("finished", style="bold green")
    text.append(took, style="default")
    if metrics:
        text.append(f": accuracy {percent(metrics.get('accuracy'))}", style="bold default")
        text.append(f", loss {number(metrics.get('loss'))}", style="default")
    best = progress.best_round or project.get("best_round")
    if best is not None:
        text.append(f" (best {progress.unit} {best} of {progress.rounds_total})", style="dim")
    yield text
    model = project.get("model") or progress.model
    if not model:
        yield from _next(((f"flops show {name}", "all about it"), ("flops ui", "compare runs")))
        return
    label = f"{clean(model['name'])}:{clean(model['version'])}"
    line = Text("model    ")
    line.append(label, style="bold")
    line.append(f"  {clean(model.get('uri') or '')}", style="dim")
    yield line
    deployment = project.get("deployment") or {}
    if deployment.get("url"):
        line = Text("served   ")
        line.append(clean(deployment["url"]), style="bold")
        yield line
    yield from _next(
        (
            *(
                ((f"flops predict {name} --data FILE", "ask the served model"),)
                if deployment
                else ((f"flops deploy {name}", "serve the model"),)
            ),
            (f"flops model get {label}", "download the model"),
            ("flops ui", "compare runs in the browser"),
            (f"flops show {name}", "all about this project"),
        )
    )


def _next(commands: tuple[tuple[str, str], ...]) -> Iterator[Text]:
    width = max(len(command) for command, _ in commands) + 2
    for index, (command, purpose) in enumerate(commands):
        text = Text("next     " if index == 0 else " " * 9)
        text.append(command.ljust(width), style="cyan")
        text.append(purpose, style="dim")
        yield text
