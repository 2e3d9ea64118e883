"""`flops admin backup` and `flops admin restore`: the manager's whole knowledge as one file, and back."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, note, print_json, say, size
from flops.core.errors import BY_CODE, ConflictError, FailedError

_PANEL = "Manager"
File = Annotated[Path, typer.Argument(metavar="FILE", help="A tar archive.", dir_okay=False)]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Back up the manager, and restore it.")
    group.command("backup", epilog="Example:  flops admin backup flops-2026-11-26.tar")(back_up)
    group.command(
        "restore",
        epilog="Example:  FLOPS_HOME=~/restored flops admin restore flops-2026-11-26.tar\n\n"
        "To another engine: FLOPS_DATABASE names the PostgreSQL to restore into.",
    )(restore)
    app.add_typer(group, name="admin", rich_help_panel=_PANEL)


def back_up(file: File, as_json: JsonFlag = False) -> None:
    """Write all that the manager knows into a new file, while it works on; the file holds secrets."""
    from flops.cli.session import manager

    if file.exists():
        raise ConflictError(f"'{file}' exists already - choose another name")
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as into:
            with manager() as client:
                client.back_up(into)
            into.flush()
            os.fsync(into.fileno())
        aside.rename(file)
    except OSError as error:
        raise FailedError(f"'{file}' cannot be written: {error.strerror} - choose another place") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    size_bytes = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "size_bytes": size_bytes})
    else:
        say((str(file), "bold"), f" has the backup ({size(size_bytes)}) - it holds secrets, keep it as such")


def restore(file: File, as_json: JsonFlag = False) -> None:
    """Restore a backup into an empty FLOPS_HOME, whose manager does not run."""
    from flops.cli.launch import settings_here

    home = settings_here().home
    # A program of the manager's own: it needs the store, and this command line knows the REST API only.
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "flops.manager.restore", "--home", str(home), str(file.absolute())],
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise _error(ended.stderr)
    answer = json.loads(ended.stdout)
    if as_json:
        print_json(answer)
        return
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(answer["created"]))
    say(f"{answer['projects']} projects and {answer['models']} models of {day} are in {home}")
    if answer["unfinished"]:
        note(f"{answer['unfinished']} of them had not ended: they failed, see 'flops ls', 'flops retry ID'")


def _error(text: str) -> Exception:
    with suppress(ValueError, KeyError, TypeError, IndexError):
        told: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
        return BY_CODE.get(told["code"], FailedError)(told["detail"])
    return FailedError(f"the restore ended unexpectedly: {text.strip()[-2000:]}")
