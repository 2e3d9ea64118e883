"""`flops web`: the address of the GUI, with a way in."""

from typing import Annotated

import typer

from flops.cli.output import JsonFlag, note, print_json, say


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Projects")(web)


def web(
    browse: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Sign in to the GUI in a browser: an address that works once, for two minutes."""
    from flops.cli.session import manager

    with manager() as client:
        url = sign_in_url(client.url)
    if as_json:
        print_json({"url": url})
    else:
        say(url)
    if not browse:
        return
    import webbrowser

    if not webbrowser.open(url):
        note("no browser could be opened")


def sign_in_url(manager: str, after: str = "") -> str:
    """An address that signs in whoever opens it first.

    Args:
        after: the path to go on to, quoted; the first page, where it is left out.
    """
    return f"{manager}/login{f'?next={after}' if after else ''}#{_code()}"


def _code() -> str:
    """Stands for the token, which is thereby in no address, no history and no log."""
    import ssl

    import httpx

    from flops.client.errors import error_of, translated
    from flops.client.login import whom_to_ask

    asked = whom_to_ask()
    trusted = ssl.create_default_context(cadata=asked.ca) if asked.ca is not None else True
    with (
        translated(asked.url),
        httpx.Client(base_url=asked.url, verify=trusted, timeout=30.0, trust_env=False) as http,
    ):
        answer = http.post("/login/codes", headers={"Authorization": f"Bearer {asked.token}"})
    if not answer.is_success:
        raise error_of(answer)
    return str(answer.json()["code"])
