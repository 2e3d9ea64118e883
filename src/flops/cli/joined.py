"""`flops node join`, `status`, `leave`, ...: this machine as a node, for the owner of its data."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flops.cli.data import FileArguments, LabelOptions, MetricsOption, SiteOption, TagOptions
from flops.cli.output import JsonFlag, age, clean, duration, note, print_json, print_table, say, size
from flops.core.consent import Consent
from flops.core.errors import ConflictError, InvalidInputError

if TYPE_CHECKING:
    from flops.node.home import NodeHome

_PANEL = "On a data owner's machine"
_STYLES = {
    "running": "green",
    "pending": "cyan",
    "failed": "bold red",
    "refused": "bold red",
    "lost": "yellow",
}

AllowTag = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-tag", metavar="TAG", help="Only data under this tag are used and told (repeatable)."
    ),
]
AllowOwner = Annotated[
    list[str] | None,
    typer.Option("--allow-owner", metavar="USER", help="Only projects of this user (repeatable)."),
]
AllowTeam = Annotated[
    list[str] | None,
    typer.Option("--allow-team", metavar="TEAM", help="Or of this team (repeatable)."),
]
AllowRepo = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-repo", metavar="URL", help="Only code from there; * at the end is any rest (repeatable)."
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `flops node`."""
    app.command(
        rich_help_panel=_PANEL,
        epilog="Example:  flops node join https://fl.example.org:8780 --allow-tag ward-7 --allow-owner ann",
    )(join)
    app.command(rich_help_panel=_PANEL)(status)
    app.command("log", rich_help_panel=_PANEL)(journal)
    app.command(rich_help_panel=_PANEL, epilog="Example:  flops node allow --tag ward-7 --team vision")(allow)
    app.command(
        rich_help_panel=_PANEL,
        epilog="Example:  flops node put patients.parquet --tag ward-7 --site clinic-a",
    )(put)
    app.command(rich_help_panel=_PANEL)(data)
    app.command(rich_help_panel=_PANEL)(drop)
    app.command(rich_help_panel=_PANEL)(start)
    app.command(rich_help_panel=_PANEL)(stop)
    app.command(rich_help_panel=_PANEL)(run)
    app.command(rich_help_panel=_PANEL)(leave)


def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the manager, as its operator told you.")],
    token: Annotated[
        str | None, typer.Argument(metavar="[TOKEN]", help="The join token; asked for if not given.")
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option("--trust", metavar="FINGERPRINT", help="Of its authority; compared by you without."),
    ] = None,
    system: Annotated[
        bool, typer.Option("--system-ca", help="Its certificate is signed by who this machine trusts.")
    ] = False,
    allow_tag: AllowTag = None,
    allow_owner: AllowOwner = None,
    allow_team: AllowTeam = None,
    allow_repo: AllowRepo = None,
    as_json: JsonFlag = False,
) -> None:
    """Let this machine take part with its data; connections go out from here only."""
    from flops.cli.identity import compare
    from flops.cli.login import ask_for_authority, fingerprint
    from flops.client.login import checked_url
    from flops.node import local

    home = _home()
    address = checked_url(url)
    found = home.membership()
    if found is not None and found.ejected is None:
        if found.url != address:
            raise ConflictError(
                f"this machine is node {found.node} of {found.url} - 'flops node leave' first, or use "
                "another FLOPS_HOME"
            )
        said = local.start(home)
        _told(home, said, "is a node already", as_json=as_json)
        if any((allow_tag, allow_owner, allow_team, allow_repo)):
            note("what is allowed stays as it was - change it with 'flops node allow'")
        return
    consent = Consent.from_json(
        {
            "tags": allow_tag or [],
            "owners": allow_owner or [],
            "teams": allow_team or [],
            "repositories": allow_repo or [],
        }
    )
    authority = None
    if address.startswith("https://") and not system:
        authority = ask_for_authority(address)
        compare(fingerprint(authority), trust)
    local.join(home, address, authority, _asked_token(token), consent)
    _told(home, local.start(home), "has joined", as_json=as_json)
    if not as_json and consent == Consent():
        note(
            "no limits are set: projects of anybody on that manager may train on any data of this node - set "
            "some with 'flops node allow'"
        )


def status(as_json: JsonFlag = False) -> None:
    """Show whether the node is connected, what it allows, what it holds and what runs."""
    from flops.node import local
    from flops.node.program import allowed

    found = local.status(_home())
    if as_json:
        print_json(found)
        return
    state, style = _connection(found)
    say(
        ("node ", ""),
        (clean(found["node"]), "bold cyan"),
        f" of {clean(found['owner'])} at {found['url']}: ",
        (state, style),
    )
    if found["error"]:
        note(found["error"])
    say(f"  allowed  {clean(allowed(Consent.from_json(found['allowed'])))}")
    if found["holdings"] is None:
        say("  data     not known while the node does not run")
    elif not found["holdings"]:
        say("  data     none that is allowed - add some with 'flops node put FILE --tag TAG --site SITE'")
    for number, holding in enumerate(found["holdings"] or []):
        say(
            f"  {'' if number else 'data':<9}{clean(holding['site'])}: {holding['num_examples']:,} examples, "
            f"{size(holding['size_bytes'])}, under {clean(', '.join(holding['tags']))}"
        )
    if not found["learners"]:
        say("  running  nothing")
    for number, one in enumerate(found["learners"]):
        rounds = f"{one['rounds']} of {one['rounds_total'] or '?'} rounds, {size(one['bytes_out'])} out"
        say(
            f"  {'' if number else 'running':<9}",
            (clean(one["project"] or one["name"]), "bold cyan"),
            f" of {clean(_whose(one))} on {clean(one['site'] or '-')}: ",
            (one["state"], _STYLES.get(one["state"], "")),
            f", {rounds}",
        )
        say(f"{'':<11}{clean(_code(one))}")
        if one["reason"]:
            say(f"{'':<11}", (clean(one["reason"]), "dim"))


def journal(
    last: Annotated[int, typer.Option("--last", "-n", min=1, help="How many of the newest.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """Show what ran on this machine's data: whose code, which version, how much left the machine."""
    from flops.node import local

    entries = local.journal(_home())[-last:]
    if as_json:
        print_json(entries)
        return
    for one in entries:
        state = "running" if one["state"] == "began" else one["state"]
        say(
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(one['began']))}  ",
            (clean(one["project"]), "bold cyan"),
            f" of {clean(_whose(one))}: ",
            (state, _STYLES.get(state, "")),
        )
        say(f"    code  {clean(_code(one))}, packages {clean(one['lock'][:12])}")
        say(f"    data  {clean(one['site'])}, under {clean(', '.join(one['tags']))}")
        if state != "refused":
            sent = f"{size(one.get('bytes_out', 0))} out, {size(one.get('bytes_in', 0))} in"
            took = f" in {duration(one['ended'] - one['began'])}" if one["ended"] is not None else ""
            say(f"    did   {one.get('rounds', 0)} rounds{took}; {sent}")
        if one["reason"]:
            say("    ", (clean(one["reason"]), "dim"))
    if not entries:
        note("nothing has run on this machine's data yet")


def allow(
    tag: Annotated[list[str] | None, typer.Option("--tag", "-t", help="Exactly these data tags.")] = None,
    owner: Annotated[
        list[str] | None, typer.Option("--owner", help="Projects of exactly these users.")
    ] = None,
    team: Annotated[list[str] | None, typer.Option("--team", help="And of exactly these teams.")] = None,
    repo: Annotated[
        list[str] | None, typer.Option("--repo", help="Code from exactly these; * at the end is any rest.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Lift all limits, but for those given here.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Change what may run on this machine's data, or show it; what is not allowed any more ends at once."""
    from flops.node import local
    from flops.node.program import allowed

    home = _home()
    given = {"tags": tag, "owners": owner, "teams": team, "repositories": repo}
    words = {kind: entries for kind, entries in given.items() if entries}
    if words or everything:
        checked = Consent.from_json(words)
        new: dict[str, Any] = {kind: getattr(checked, kind) for kind in words}
        consent = local.allow(home, lambda now: replace(Consent() if everything else now, **new))
    else:
        home.required_membership()
        consent = home.consent()
    if as_json:
        print_json(consent.to_json())
    else:
        say(f"allowed is {clean(allowed(consent))}")


def put(
    files: FileArguments,
    tag: TagOptions = None,
    site: SiteOption = "local",
    allow_metrics: MetricsOption = False,
    label: LabelOptions = None,
    as_json: JsonFlag = False,
) -> None:
    """Store files on this machine; the manager hears of tags and counts, never of rows."""
    from flops.cli.parquet import parquet_file
    from flops.node import local

    home = _home()
    if not tag:
        raise typer.BadParameter("name at least one: learners find data by tag", param_hint="--tag")
    labels = dict(_pair(text) for text in label or [])
    stored = []
    for file in files:
        with parquet_file(file) as parquet:
            stored.append(
                local.put(home, parquet, tag, site, allow_metrics=allow_metrics, labels=labels).to_json()
            )
    _print_fragments(home, stored, as_json=as_json)


def data(as_json: JsonFlag = False) -> None:
    """List the data on this machine, and what of them the manager hears."""
    from flops.node import local

    home = _home()
    with local.data(home) as client:
        found = [fragment.to_json() for fragment in client.list()]
    _print_fragments(home, found, as_json=as_json)


def drop(
    fragments: Annotated[list[str], typer.Argument(metavar="FRAGMENT...", help="Ids of fragments.")],
    as_json: JsonFlag = False,
) -> None:
    """Remove data from this machine; learners that have loaded them keep them until they end."""
    from flops.node import local

    home = _home()
    with local.data(home) as client:
        for fragment in fragments:
            client.drop(fragment)
            if not as_json:
                say("removed ", (clean(fragment), "bold cyan"))
    local.poke(home)
    if as_json:
        print_json({"removed": fragments})


def start(as_json: JsonFlag = False) -> None:
    """Run the node in the background."""
    from flops.node import local

    home = _home()
    was = home.running_pid() is not None
    _told(home, local.start(home), "was running already" if was else "runs", as_json=as_json)


def stop(as_json: JsonFlag = False) -> None:
    """Stop the node and all that it runs; it stays a node, and 'flops node start' goes on."""
    from flops.node import local

    home = _home()
    membership = home.required_membership()
    was = local.stop(home)
    if as_json:
        print_json({"node": membership.node, "was_running": was})
    else:
        say(f"node {membership.node} is stopped, nothing runs here" if was else "the node was not running")


def run() -> None:
    """Run the node in the foreground, for systemd and the like; its log goes to standard error."""
    home = _home()
    home.required_membership()
    command = [sys.executable, "-P", "-m", "flops.node", "--home", str(home.folder.parent)]
    os.execv(sys.executable, command)  # noqa: S606 - our own program, from a list


def leave(
    purge: Annotated[bool, typer.Option("--purge", help="Remove the data and the journal, too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Leave: stop everything, tell the manager, forget the credential. The data stay on this machine."""
    from flops.node import local

    home = _home()
    was, untold = local.leave(home, purge=purge)
    if as_json:
        print_json({"node": was.node, "url": was.url, "told": untold is None, "why": untold, "purged": purge})
        return
    say(f"node {was.node} has left {was.url}; nothing runs here any more")
    if untold is not None:
        note(f"the manager could not be told ({untold}) - it will see the node as away, then as lost")
    note("data and journal are removed" if purge else f"data and journal are still in {home.folder}")


def _home() -> "NodeHome":
    from flops.cli.launch import settings_here
    from flops.node.home import NodeHome

    return NodeHome(settings_here().home)


def _asked_token(token: str | None) -> str:
    if token is None:
        if sys.stdin.isatty():
            token = str(typer.prompt("join token", hide_input=True, prompt_suffix=": "))
        else:
            token = sys.stdin.readline()
    if not token.strip():
        raise InvalidInputError("no join token was given - ask the manager's operator for one")
    return token.strip()


def _told(home: "NodeHome", said: Mapping[str, Any], words: str, *, as_json: bool) -> None:
    membership = home.required_membership()
    if as_json:
        print_json(
            {
                "node": membership.node,
                "owner": membership.owner,
                "url": membership.url,
                "pid": said.get("pid"),
                "connected": bool(said.get("connected")),
                "error": said.get("error", ""),
            }
        )
        return
    say(f"node {clean(membership.node)} of {clean(membership.owner)} {words} at {membership.url}")
    if said.get("connected"):
        note("it is connected; see 'flops node status'")
    else:
        note(f"it is not connected yet and tries again: {said.get('error', '')}")


def _connection(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["ejected"] is not None:
        return "the manager does not know it any more", "bold red"
    if not found["running"]:
        return "stopped", "yellow"
    if found["connected"]:
        return f"connected, heard of {age(found['last_sync'])}", "green"
    return "the manager is away", "yellow"


def _whose(one: Mapping[str, Any]) -> str:
    return f"{one.get('owner') or '-'}" + (f" (team {one['team']})" if one.get("team") else "")


def _code(one: Mapping[str, Any]) -> str:
    commit = (one.get("commit") or "")[:12]
    return f"{one.get('repository') or '-'}@{commit}" if commit else str(one.get("repository") or "-")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"'{text[:40]}' is not NAME=VALUE", param_hint="--label")
    return name, value


def _print_fragments(home: "NodeHome", fragments: list[dict[str, Any]], *, as_json: bool) -> None:
    consent = home.consent()
    for one in fragments:
        one["told"] = list(consent.shown(one["tags"]))
    if as_json:
        print_json(fragments)
        return
    print_table(
        ("fragment", "site", "#examples", "#size", "tags", "told to the manager"),
        [
            (
                one["id"],
                one["site"],
                f"{one['num_examples']:,}",
                size(one["size_bytes"]),
                ", ".join(one["tags"]),
                f"counts, under {', '.join(one['told'])}" if one["told"] else "nothing",
            )
            for one in fragments
        ],
        "no data - add some with 'flops node put FILE --tag TAG --site SITE'",
    )
