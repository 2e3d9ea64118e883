"""`flops login`, `logout`, `whoami`, `user`, `token`, `audit`: who may use a manager, and what they did."""

import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, age, clean, note, print_json, print_table, say
from flops.core.errors import FailedError, FlopsError, InvalidInputError

_PANEL = "Users"
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
Roles = Annotated[
    str | None, typer.Option("--role", help="admin, engineer, data-owner or auditor.", metavar="ROLE")
]
Teams = Annotated[
    list[str] | None, typer.Option("--team", help="Shares projects with its members; may be repeated.")
]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=_PANEL, epilog="Example:  flops login https://fl.example.org:8780")(login)
    app.command(rich_help_panel=_PANEL)(logout)
    app.command(rich_help_panel=_PANEL)(whoami)
    users = typer.Typer(no_args_is_help=True, help="Add, list and change users.")
    users.command("add", epilog="Example:  flops user add ann --role engineer --team vision")(add_user)
    users.command("ls")(list_users)
    users.command("set", epilog="Example:  flops user set ann --role auditor")(set_user)
    app.add_typer(users, name="user", rich_help_panel=_PANEL)
    tokens = typer.Typer(no_args_is_help=True, help="Make, list and revoke tokens.")
    tokens.command("create", epilog="Example:  flops token create ci --scope projects --for 30d")(
        create_token
    )
    tokens.command("ls")(list_tokens)
    tokens.command("revoke")(revoke_token)
    app.add_typer(tokens, name="token", rich_help_panel=_PANEL)
    log = typer.Typer(no_args_is_help=True, help="Read and verify the audit log.")
    log.command("ls")(list_audit)
    log.command("verify")(verify_audit)
    app.add_typer(log, name="audit", rich_help_panel=_PANEL)


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a manager that listens to other machines.")],
    trust: Annotated[
        str | None,
        typer.Option(
            "--fingerprint", help="Of its authority, as 'flops up --listen' shows it; asked for without."
        ),
    ] = None,
    system: Annotated[
        bool, typer.Option("--system-ca", help="Its certificate is signed by who this machine trusts.")
    ] = False,
    sso: Annotated[
        bool, typer.Option("--sso", help="Sign in with the manager's issuer, in a browser; no token needed.")
    ] = False,
    browse: Annotated[
        bool, typer.Option("--browser/--no-browser", help="With --sso: open one, or print the address alone.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Talk to a manager elsewhere from now on; its token is asked for, or read from FLOPS_TOKEN."""
    from flops.cli.launch import settings_here
    from flops.cli.login import ask_for_authority, fingerprint, keep
    from flops.client import Client
    from flops.client.login import Login, checked_url

    address = checked_url(url)
    authority = None
    if address.startswith("https://") and not system:
        authority = ask_for_authority(address)
        compare(fingerprint(authority), trust)
    token = _signed_in(address, authority, browse=browse) if sso else os.environ.get("FLOPS_TOKEN")
    found = Login(address, (token or _asked("token", hidden=True)).strip(), authority)
    with Client(found.url, found.token, found.ca) as client:
        said = client.me()
    keep(settings_here(), found)
    if as_json:
        print_json(said)
    else:
        say(f"signed in at {address} as {said['user']} ({said['role']})")


def _signed_in(address: str, authority: str | None, *, browse: bool) -> str:
    from flops.cli.sign_in import sign_in
    from flops.client import Client

    with Client(address, "", authority) as client:
        return sign_in(client, browse=browse)["token"]


def compare(found: str, expected: str | None) -> None:
    """Let the user compare an authority's fingerprint, where they did not give it.

    Raises:
        FailedError: it is not the same.
    """
    if expected is not None:
        if re.sub("[^0-9A-F]", "", expected.upper().removeprefix("SHA256")) != found.replace(":", ""):
            raise FailedError(
                f"the authority's fingerprint is {found}, not the one that was given - somebody may stand "
                "between, ask the manager's operator"
            )
        return
    note(
        f"the manager's authority has the fingerprint\n  {found}\ncompare it with what its operator told you"
    )
    if _asked("is it the same? [y/N]").strip().lower() not in ("y", "yes"):
        raise FailedError("the fingerprint was not confirmed: nothing was sent there")


def _asked(what: str, *, hidden: bool = False) -> str:
    if not sys.stdin.isatty() and not hidden:
        raise InvalidInputError("nobody can be asked here - give --fingerprint")
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    return str(typer.prompt(what, hide_input=hidden, prompt_suffix=": ", default="", show_default=False))


def logout(as_json: JsonFlag = False) -> None:
    """Talk to this machine's own manager again; a token stays good, one that came from --sso is revoked."""
    from flops.cli.launch import settings_here
    from flops.cli.login import forget
    from flops.client import Client
    from flops.client.login import find_login

    settings = settings_here()
    kept = None
    with suppress(InvalidInputError):  # what cannot be read is forgotten as well
        kept = find_login(settings, {})
    was = forget(settings)
    if kept is not None:
        with suppress(FlopsError), Client(kept.url, kept.token, kept.ca, attempts=1, timeout_s=10) as client:
            said = client.me()
            if said["signed_in"] and said["token"]:
                client.revoke_token(said["token"])
    if as_json:
        print_json({"was_signed_in": was})
    else:
        say("signed out" if was else "you were not signed in anywhere")


def whoami(as_json: JsonFlag = False) -> None:
    """Print who you are to the manager, and what your token is good for."""
    from flops.cli.session import manager

    with manager() as client:
        said = client.me()
        where = client.url
    if as_json:
        print_json({**said, "url": where})
        return
    teams = f", teams {', '.join(said['teams'])}" if said["teams"] else ""
    say(f"{said['user']} ({said['role']}{teams}) at {where}")
    until = f", until {_day(said['expires'])}" if said["expires"] else ""
    note(f"good for {', '.join(said['scopes'])}{until}")


def add_user(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    role: Roles = None,
    team: Teams = None,
    as_json: JsonFlag = False,
) -> None:
    """Add a user; 'flops token create --user NAME' next lets them in."""
    from flops.cli.session import manager

    wanted: dict[str, Any] = {"name": name, "role": role or "engineer", "teams": team or []}
    with manager() as client:
        made = client.add_user(**wanted)
    if as_json:
        print_json(made)
    else:
        say(f"user {made['name']} ({made['role']}) is there")
        note(f"let them in with: flops token create first --user {made['name']}")


def list_users(as_json: JsonFlag = False) -> None:
    """List users."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.list_users()["users"]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one["name"],
            one["role"],
            ", ".join(one["teams"]) or "-",
            "shut out" if one["disabled"] else "",
            age(one["created"]),
        )
        for one in found
    ]
    print_table(("user", "role", "teams", "", "since"), rows, "no users yet")


def set_user(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    role: Roles = None,
    team: Teams = None,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Shut out with all tokens, or let in again.")
    ] = None,
    unbind: Annotated[
        bool,
        typer.Option("--unbind", help="Forget who they are at the issuer; the next one of that name is."),
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Change a user's role or teams, or shut them out."""
    from flops.cli.session import manager

    wanted = {"role": role, "teams": team, "disabled": disabled, "unbind": unbind or None}
    change: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    if not change:
        raise InvalidInputError(
            "nothing was to be changed - give --role, --team, --disable, --enable or --unbind"
        )
    with manager() as client:
        changed = client.change_user(name, **change)
    if as_json:
        print_json(changed)
    else:
        out = ", shut out" if changed["disabled"] else ""
        say(
            f"user {changed['name']} is {changed['role']}, teams {', '.join(changed['teams']) or 'none'}{out}"
        )


def create_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    user: Annotated[str | None, typer.Option(help="Whose; yours if not given.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Such as projects or data:read; may be repeated; all if not given."),
    ] = None,
    lasts: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="Such as 8h or 30d; until revoked if not given."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a token; it is shown once."""
    from flops.cli.session import manager

    wanted: dict[str, Any] = {"name": name, "user": user, "scopes": scope or None}
    if lasts is not None:
        wanted["expires_s"] = seconds(lasts)
    with manager() as client:
        made = client.add_token(**wanted)
    if as_json:
        print_json(made)
        return
    say(made["token"])
    until = f" until {_day(made['expires'])}" if made["expires"] else ""
    note(f"token {made['id']} of {made['user']}, good{until} - it is not shown again")


def list_tokens(
    user: Annotated[str | None, typer.Option(help="Whose; all that you may see if not given.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List tokens; never their text."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.list_tokens(user=user)["tokens"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("token", "user", "for", "state", "used", "made"),
        [
            (one["id"], one["user"], one["name"], _state(one), age(one["last_used"]), age(one["created"]))
            for one in found
        ],
        "no tokens yet - make one with 'flops token create NAME'",
    )


def revoke_token(
    number: Annotated[str, typer.Argument(metavar="ID", help="See 'flops token ls'.")],
    as_json: JsonFlag = False,
) -> None:
    """Revoke a token: nobody comes in with it from now on."""
    from flops.cli.session import manager

    with manager() as client:
        revoked = client.revoke_token(number)
    if as_json:
        print_json(revoked)
    else:
        say(f"token {revoked['id']} of {revoked['user']} is revoked")


def list_audit(
    user: Annotated[str | None, typer.Option(help="Whose requests.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, max=10_000, help="So many, the newest.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """List what was asked of the manager, by whom, and the status it was answered with."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.audit(user=user, limit=last, newest=True)["entries"]
    found.reverse()
    if as_json:
        print_json(found)
        return
    print_table(
        ("#no", "time", "user", "from", "#status", "request", "object"),
        [
            (
                str(one["seq"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"])),
                one["user"] or "nobody known",
                one["address"],
                str(one["outcome"]),
                one["action"],
                one["object"],
            )
            for one in found
        ],
        "nothing was asked yet",
    )


def verify_audit(
    head: Annotated[
        str | None, typer.Option(metavar="NUMBER:HASH", help="As an earlier verification printed it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that no entry of the audit log was changed, removed or put in between."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.verify(head=head)
    if as_json:
        print_json(found)
    elif found["ok"]:
        say(f"the audit log is whole: {found['entries']} entries")
        note(f"note this, to see later that none is missing at its end:\n  {found['head']}")
    if not found["ok"]:
        raise FailedError(
            f"the audit log was tampered with: {found['reason']} - keep a copy of the database, and see who "
            "could write it"
        )


def seconds(text: str) -> float:
    """Raises: InvalidInputError: it is no time such as ``30d``."""
    found = re.fullmatch(r"([0-9]{1,6})(s|min|h|d)", text.strip())
    if found is None:
        raise InvalidInputError(
            f"'{clean(text)[:40]}' is no time - use a number with s, min, h or d, such as 30d"
        )
    return float(found.group(1)) * _UNITS[found.group(2)]


def _state(token: Mapping[str, Any]) -> str:
    if token["revoked"] is not None:
        return "revoked"
    if token["expires"] is None:
        return "good"
    return "expired" if token["expires"] <= time.time() else f"good until {_day(token['expires'])}"


def _day(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(then))
