"""`flops node ls`, `token`, `rm`: the machines that services run on, those that joined among them."""

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from flops.cli import joined
from flops.cli.identity import seconds
from flops.cli.output import JsonFlag, age, note, print_json, print_table, say

app = typer.Typer(no_args_is_help=True, help="See, join and leave machines that take part.")


def register(parent: typer.Typer) -> None:
    app.command("ls")(list_nodes)
    app.command("token", epilog="Example:  flops node token clinic-north --for 2h")(make_token)
    app.command("rm")(eject)
    joined.add_to(app)
    parent.add_typer(app, name="node", rich_help_panel="Data")


def list_nodes(as_json: JsonFlag = False) -> None:
    """List the machines that services are placed on, and those that joined."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.list_nodes()["nodes"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("node", "kind", "owner", "state", "platform", "#cpus", "data tags", "allows"),
        [
            (
                one["name"],
                one["kind"],
                one["owner"] or "-",
                _state(one),
                one["platform"],
                str(one["cpus"]),
                ", ".join(one["tags"]) or "-",
                _allows(one["policy"]),
            )
            for one in found
        ],
        "no nodes yet",
    )
    if not any(one["kind"] == "joined" for one in found):
        note("let a data owner's machine join with: flops node token NAME")


def make_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the machine will be called.")],
    lasts: Annotated[str, typer.Option("--for", metavar="TIME", help="Such as 2h or 7d.")] = "1d",
    owner: Annotated[
        str | None, typer.Option(help="The data owner whose it will be; yours if not given.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token with which one machine joins, once; it is shown once."""
    from flops.cli.session import manager

    with manager() as client:
        made = client.add_join_token(node=name, lasts_s=seconds(lasts), owner=owner)
        where = client.url
    if as_json:
        print_json({**made, "url": where})
        return
    say(made["token"])
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(made["expires"]))
    note(f"good once, until {until}, for node {made['node']} of {made['owner']} - it is not shown again")
    note(f"on that machine:  flops node join {where} TOKEN")


def eject(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of one that joined.")],
    as_json: JsonFlag = False,
) -> None:
    """Eject a joined machine: it is not let in any more, learners there are lost."""
    from flops.cli.session import manager

    with manager() as client:
        client.eject_node(name)
    if as_json:
        print_json({"node": name})
    else:
        say(f"node {name} is ejected")


def _state(node: Mapping[str, Any]) -> str:
    if node["ready"]:
        return "ready"
    return "away" if node["last_seen"] is None else f"away, last seen {age(node['last_seen'])}"


def _allows(policy: Mapping[str, Any] | None) -> str:
    if policy is None:
        return "-"
    said = [f"{kind} {', '.join(words)}" for kind, words in policy.items() if words]
    return "; ".join(said) or "all"
