"""The manager itself: up, down, ui, version."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flops.client import Client
    from flops.core.settings import Settings

from flops.cli.output import JsonFlag, note, print_json, say

_PANEL = "Manager"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Data and models")(ui)
    app.command(rich_help_panel=_PANEL)(up)
    app.command(rich_help_panel=_PANEL)(down)
    app.command(rich_help_panel=_PANEL)(version)


def ui(
    browse: Annotated[bool, typer.Option("--open", help="Open it in a browser too.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """MLflow's GUI behind the manager: runs, metrics, models. The address signs you in, once."""
    from urllib.parse import quote, urlsplit

    from flops.cli.session import manager
    from flops.cli.web import sign_in_url

    with manager() as client:
        url = client.start_ui()["url"]
        if url.startswith(f"{client.url}/"):
            url = sign_in_url(client.url, quote(urlsplit(url).path, safe=""))
    if as_json:
        print_json({"url": url})
    else:
        say(url)
    if browse:
        import webbrowser

        if not webbrowser.open(url):
            note("no browser could be opened")


def up(
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of its REST API; any free one if not given.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST[:PORT]", help="Answer other machines as well, over TLS; such as 0.0.0.0."),
    ] = None,
    standby: Annotated[
        bool,
        typer.Option("--standby", help="One more, which takes over when the one that acts has ended."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Start the manager of this machine; other commands do so when they need it."""
    from flops.cli.launch import ensure, find_here, settings_here

    settings = settings_here()
    if standby or settings.standby:
        _stand_by(settings, port, as_json=as_json)
        return
    running = find_here(settings)
    with running or ensure(settings, port=port, listen=listen, announce=note) as client:
        health = client.get_health()
        shared = _shared(settings, client) if listen or settings.listen else {}
    if as_json:
        print_json({"url": client.url, **health, **shared})
        return
    words = "was running already" if running else "is running"
    say(f"the manager {words}: {client.url} (pid {health['pid']}), its files are in {settings.home}")
    if running and listen is not None:
        note("it listens where it did - for another address: 'flops down', then 'flops up --listen ...'")
    if shared:
        say(f"others sign in with 'flops login https://HOST:PORT'; its authority is {shared['fingerprint']}")
    if "admin_token" in shared:
        say(f"the admin's token, shown this once: {shared['admin_token']}")
    if running and port is not None and not client.url.endswith(f":{port}"):
        note(f"it keeps its port - for port {port}: 'flops down', then 'flops up --port {port}'")


def _stand_by(settings: "Settings", port: int | None, *, as_json: bool) -> None:
    from flops.cli.launch import start_standby
    from flops.client import Client
    from flops.core.errors import InvalidInputError

    if settings.database_url is None:
        raise InvalidInputError(
            "a standby needs a PostgreSQL that it shares with the manager that acts - name it with "
            "FLOPS_DATABASE"
        )
    address = start_standby(settings, port=port)
    with Client(address.url, token="") as client:
        health = client.get_health()
    if as_json:
        print_json({"url": address.url, **health})
    elif health["status"] == "standby":
        say(f"a manager stands by for {health['active']}: {address.url} (pid {health['pid']})")
    else:
        say(f"no other manager acts, so this one does: {address.url} (pid {health['pid']})")


def _shared(settings: "Settings", client: "Client") -> dict[str, str]:
    """What the operator passes on, and the admin's token where nobody has one yet."""
    from flops.cli.login import fingerprint

    authority = settings.authority_dir / "ca.pem"
    if not authority.exists():
        return {}
    shared = {"fingerprint": fingerprint(authority.read_text(encoding="ascii"))}
    if not client.list_tokens(user="admin")["tokens"]:
        shared["admin_token"] = client.add_token(name="first start", user="admin")["token"]
    return shared


def down(
    force: Annotated[bool, typer.Option("--force", "-f", help="Stop projects that still run.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Stop the manager of this machine and what it started."""
    from flops.cli.launch import end_standbys, find_here, settings_here, wait_until_gone
    from flops.core.errors import UnavailableError

    settings = settings_here()
    end_standbys(settings)  # none of this machine is to take over
    client = find_here(settings)
    if client is None:
        _tell_down(was_running=False, as_json=as_json)
        return
    with client:
        client.shut_down(force=force)
        if not wait_until_gone(settings, client):
            raise UnavailableError(
                f"the manager at {client.url} still answers - see {settings.logs_dir / 'manager.log'}"
            )
    _tell_down(was_running=True, as_json=as_json)


def _tell_down(*, was_running: bool, as_json: bool) -> None:
    if as_json:
        print_json({"was_running": was_running})
    else:
        say("the manager is stopped" if was_running else "no manager was running")


def version(as_json: JsonFlag = False) -> None:
    """Print the versions of this command and of the running manager."""
    from flops import __version__
    from flops.cli.launch import find, settings_here

    client = find(settings_here())
    running = None
    if client is not None:
        with client:
            running = str(client.get_health()["version"])
    if as_json:
        print_json({"flops": __version__, "manager": running})
    else:
        say(f"flops {__version__}" + (f", manager {running}" if running else ", no manager is running"))
