"""Looking at projects, pausing and ending them: ls, show, logs, events, pause, resume, retry, extend,
stop, rm.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flops.cli.output import (
    JsonFlag,
    age,
    clean,
    console,
    duration,
    number,
    percent,
    print_json,
    print_json_line,
    print_table,
    say,
    state_text,
)
from flops.cli.session import ProjectArgument, ProjectArguments

if TYPE_CHECKING:
    from rich.tree import Tree

    from flops.client import Client, ProjectEvent

_PANEL = "Federated training"
_STOP_DEADLINE_S = 30.0
_MANY = 50
"""Of more learners than these, only those that have something to say are listed."""


def register(app: typer.Typer) -> None:
    for name, command in (
        ("ls", list_projects),
        ("show", show),
        ("logs", logs),
        ("events", events),
        ("pause", pause),
        ("resume", resume),
        ("retry", retry),
        ("extend", extend),
        ("stop", stop),
        ("rm", remove),
    ):
        app.command(name, rich_help_panel=_PANEL)(command)


def list_projects(
    state: Annotated[
        list[str] | None, typer.Option(help="Only in this state, such as training (repeatable).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only of this name.")] = None,
    search: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only with this in id, name, source or reason.")
    ] = None,
    last: Annotated[int | None, typer.Option("--last", min=1, help="So many, the newest.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List projects, the newest first."""
    from flops.cli.session import manager

    wanted: dict[str, Any] = {"state": state, "name": name, "text": search, "page": min(last or 500, 500)}
    with manager() as client:
        found = list(islice(client.iterate_projects(**wanted), last))
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "name", "state", "#round", "#accuracy", "created", "remark"),
        (
            (
                project["id"],
                project["name"] or "",
                state_text(project["state"]),
                f"{project['rounds_done']}/{project['rounds_total']}",
                percent((project.get("metrics") or {}).get("accuracy")),
                age(project["created"]),
                _remark(project),
            )
            for project in found
        ),
        "no projects yet - start one with 'flops run REPO'",
    )


def _remark(project: Mapping[str, Any]) -> str:
    if project.get("reason"):
        return str(project["reason"]).splitlines()[0]
    model = project.get("model")
    return f"{model['name']}:{model['version']}" if model else ""


def show(project: ProjectArgument, as_json: JsonFlag = False) -> None:
    """Tell all about one project."""
    from flops.cli.session import manager

    with manager() as client:
        found, url = client.get_project(project), client.url
    if as_json:
        print_json(found)
        return
    say((found["id"], "bold cyan"), "  ", (clean(found.get("name") or ""), "bold"))
    for label, value in _facts(found, url):
        say((label.ljust(12), "dim"), clean(value))
    learners = found.get("learners") or []
    if found.get("clusters"):
        say()
        console().print(_hierarchy(found))
    elif learners:
        say()
        shown, others = _worth_a_line(learners)
        if shown:
            print_table(
                ("learner", "site", "state", "reason"),
                [(one["id"], one["site"], one["state"], one.get("reason") or "") for one in shown],
                "",
            )
        if others:
            say(f"{others} ('flops show --json' lists them all)")
    services = found.get("services") or []
    if services:
        say()
        print_table(
            ("service", "state", "#restarts", "reason"),
            [
                (
                    one["name"] + (f" ({one['cluster']})" if one.get("cluster") else ""),
                    one.get("state") or "-",
                    str(one.get("restarts", 0)),
                    one.get("reason") or "",
                )
                for one in services
            ],
            "",
        )


def _hierarchy(found: Mapping[str, Any]) -> "Tree":
    from rich.tree import Tree

    branches = {None: Tree(Text("root", style="bold"), guide_style="dim")}
    for cluster in found["clusters"]:
        text = _member(cluster["id"].rpartition("/")[2], cluster)
        if cluster.get("rounds_done"):
            text.append(f"  {cluster['rounds_done']} rounds", style="dim")
        text.stylize("bold", 0, len(cluster["id"].rpartition("/")[2]))
        branches[cluster["id"]] = branches[cluster["parent"]].add(text)
    for path, branch in branches.items():
        shown, others = _worth_a_line([one for one in found["learners"] if one.get("cluster") == path])
        for learner in shown:
            branch.add(_member(f"{learner['id']}  {learner['site']}", learner))
        if others:
            branch.add(Text(others, style="dim"))
    return branches[None]


def _worth_a_line(learners: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Of many learners those that have something to tell, and all in a few words."""
    if len(learners) <= _MANY:
        return learners, ""
    states = Counter(one["state"] for one in learners)
    counts = ", ".join(f"{count} {clean(state)}" for state, count in states.most_common())
    return [one for one in learners if one.get("reason")][:_MANY], f"{len(learners)} learners: {counts}"


def _member(name: str, member: Mapping[str, Any]) -> Text:
    text = Text(f"{clean(name)}  ")
    text.append(state_text(member["state"]))
    if member.get("reason"):
        text.append(f"  {clean(member['reason'])}", style="dim")
    return text


def _facts(found: Mapping[str, Any], manager: str) -> list[tuple[str, str]]:
    spec = found.get("spec") or {}
    training = spec.get("training") or {}
    strategy = training.get("strategy") or {}
    parameters = ", ".join(f"{key}={value}" for key, value in (strategy.get("parameters") or {}).items())
    metrics = found.get("metrics") or {}
    best = found.get("best_round")
    model = found.get("model")
    end = found.get("finished") or time.time()
    unit = "cycle" if training.get("mode") == "hierarchical" else "round"
    experiment = found.get("experiment_url")
    facts = [
        ("state", found["state"] + (f" - {found['reason']}" if found.get("reason") else "")),
        ("source", found.get("source")),
        ("commit", found.get("commit")),
        ("contract", found.get("contract")),
        ("lock", found.get("lock")),
        ("starts from", (spec.get("model") or {}).get("initial")),
        ("data", ", ".join((spec.get("data") or {}).get("tags") or [])),
        ("mode", training.get("mode") if training.get("mode") != "classic" else None),
        ("strategy", f"{strategy.get('name', '')}{f' ({parameters})' if parameters else ''}"),
        (
            f"{unit}s",
            f"{found['rounds_done']} of {found['rounds_total']}" + (f", best {best}" if best else ""),
        ),
        (
            f"last {unit}",
            f"accuracy {percent(metrics.get('accuracy'))}, loss {number(metrics.get('loss'))}"
            if metrics
            else None,
        ),
        ("model", f"{model['name']}:{model['version']}  {model.get('uri') or ''}" if model else None),
        ("served", _served(found.get("deployment"))),
        ("experiment", f"{manager}{experiment}" if str(experiment).startswith("/") else experiment),
        ("created", f"{age(found['created'])}, took {duration(end - found['created'])}"),
    ]
    return [(label, str(value)) for label, value in facts if value]


def _served(deployment: Mapping[str, Any] | None) -> str | None:
    if deployment is None:
        return None
    what = f"{deployment['model']}:{deployment['version']}"
    if deployment["state"] == "running" and deployment.get("url"):
        return f"{what} at {deployment['url']}"
    return f"{what} is {deployment['state']}" + (f": {deployment['reason']}" if deployment["reason"] else "")


def logs(
    project: ProjectArgument,
    service: Annotated[
        str | None, typer.Option(help="One service only, as 'flops show ID' names it.")
    ] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="The last lines of each only.")] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="REQUEST", help="Only what was said for one request, by its id; in time's order."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they were written.")] = False,
) -> None:
    """Print what a project's services wrote.

    Events of a project's states, answers of the API (X-Request-ID), errors and the audit log name the
    requests that --trace takes.
    """
    from flops.cli.log_lines import show_by_service, show_by_time
    from flops.cli.session import manager

    with manager() as client:
        found = client.get_logs(project, service=service, tail=tail, request=trace)["logs"]
    if as_json:
        print_json(found)
    elif trace is not None:
        show_by_time(found, project)
    else:
        show_by_service(found)


def events(
    project: ProjectArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-F", help="Wait for more until the project ends.")
    ] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events with a higher number.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Print a project's events; with --json one on each line."""
    from flops.cli.session import finder, manager

    with manager() as client:
        if not follow:
            for event in client.iterate_events(project, after):
                _print_event(event, as_json=as_json)
            return
        client.get_project(project)
    _follow_events(project, finder(), after, as_json=as_json)


def _follow_events(project: str, find: Any, after: int, *, as_json: bool) -> None:
    from flops.cli.follow import Away, Back, follow
    from flops.cli.output import note

    try:
        for item in follow(project, find, after=after):
            if isinstance(item, Away):
                note("manager is away, waiting")
            elif isinstance(item, Back):
                note("manager is back")
            else:
                _print_event(item, as_json=as_json)
    except KeyboardInterrupt:
        note(f"left {project} running")


def _print_event(event: "ProjectEvent", *, as_json: bool) -> None:
    if as_json:
        print_json_line(event.json)
        return
    facts = "  ".join(f"{key}={_short(value)}" for key, value in event.data.items() if value is not None)
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    say((f"{event.seq:>5} {clock} ", "dim"), (event.kind.ljust(18), "cyan"), clean(facts))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    return str(value)


def stop(projects: ProjectArguments, as_json: JsonFlag = False) -> None:
    """End projects; what they have reached so far stays."""
    from flops.cli.session import manager

    with manager() as client:
        for project in projects:
            client.stop_project(project)
        ended = [_wait_while(client, project, "stopping") for project in projects]
    _print_states(ended, as_json=as_json)


def pause(projects: ProjectArguments, as_json: JsonFlag = False) -> None:
    """Pause projects; 'flops resume' lets them go on after their last finished round."""
    from flops.cli.session import manager

    with manager() as client:
        for project in projects:
            client.pause_project(project)
        paused = [_wait_while(client, project, "pausing") for project in projects]
    _print_states(paused, as_json=as_json)


def resume(projects: ProjectArguments, as_json: JsonFlag = False) -> None:
    """Let paused projects go on."""
    from flops.cli.session import manager

    with manager() as client:
        resumed = [client.resume_project(project) for project in projects]
    _print_states(resumed, as_json=as_json, advice="watch it with 'flops attach {}'")


def retry(projects: ProjectArguments, as_json: JsonFlag = False) -> None:
    """Attempt failed or stopped projects once more, from their last finished step or round."""
    from flops.cli.session import manager

    with manager() as client:
        retried = [client.retry_project(project) for project in projects]
    _print_states(retried, as_json=as_json, advice="watch it with 'flops attach {}'")


def extend(
    project: ProjectArgument,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="How many more.")],
    as_json: JsonFlag = False,
) -> None:
    """Train more rounds of a finished or paused project, and register the outcome as its next version."""
    from flops.cli.session import manager

    with manager() as client:
        extended = client.extend_project(project, rounds=rounds)
    paused = extended["state"] == "paused"
    advice = "resume it with 'flops resume {}'" if paused else "watch it with 'flops attach {}'"
    _print_states([extended], as_json=as_json, advice=advice)


def _print_states(projects: Sequence[Mapping[str, Any]], *, as_json: bool, advice: str = "") -> None:
    if as_json:
        print_json(projects)
        return
    for found in projects:
        more = f"  {advice.format(found['id'])}" if advice else ""
        say((found["id"], "bold cyan"), "  ", (found["state"], "yellow"), more)


def _wait_while(client: "Client", project: str, state: str) -> Mapping[str, Any]:
    from flops.core.errors import UnavailableError

    deadline = time.monotonic() + _STOP_DEADLINE_S
    while (found := client.get_project(project))["state"] == state:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"project {project} is still {found['state']} after {_STOP_DEADLINE_S:.0f} s - "
                f"see 'flops show {project}'"
            )
        time.sleep(0.1)
    return found


def remove(
    projects: ProjectArguments,
    force: Annotated[bool, typer.Option("--force", "-f", help="Stop them first.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove ended projects with their files; registered models stay."""
    from flops.cli.session import manager

    with manager() as client:
        for project in projects:
            client.remove_project(project, force=force)
            if not as_json:
                say("removed ", (project, "bold cyan"))
    if as_json:
        print_json({"removed": projects})
