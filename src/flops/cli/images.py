"""`flops images`: the images that projects run in, and what they are built on."""

from typing import Annotated, Any

import typer

from flops.cli.output import JsonFlag, note, print_json, print_table, say, size

_PANEL = "Operation"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="List images; make base images.")
    group.command("ls")(list_images)
    group.command(
        "base",
        epilog="Example:\n\nflops images base --suite bookworm --platform linux/amd64,linux/arm64",
    )(base)
    app.add_typer(group, name="images", rich_help_panel=_PANEL)


def list_images(as_json: JsonFlag = False) -> None:
    """List the images of this FLOPS_HOME."""
    from flops.cli.session import manager

    with manager() as client:
        found = client.list_images()["images"]
    if as_json:
        print_json(found)
        return
    print_table(
        ("image", "platforms", "#size", "digest"),
        [
            (one["name"], ", ".join(one["platforms"]), size(one["size_bytes"]), one["digest"][7:19])
            for one in found
        ],
        "no images yet - projects on containers make some, and 'flops images base' does",
    )


def base(
    suite: Annotated[str, typer.Option(help="Of Debian.")] = "bookworm",
    platform: Annotated[
        list[str] | None,
        typer.Option(help="Such as linux/amd64,linux/arm64 (repeatable); both if not given."),
    ] = None,
    mirror: Annotated[
        str | None, typer.Option(metavar="URL", help="A Debian mirror; this machine's own if not given.")
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Make it again, from the packages of today.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a base image from Debian's packages, for sites without a way to a public registry.

    Nothing of it is executed here, so every platform can be made on every machine.
    """
    from flops.cli.session import manager

    platforms = [one.strip() for given in platform or [] for one in given.split(",") if one.strip()]
    with manager() as client:
        made: dict[str, Any] = {}
        for line in client.make_base_image(
            suite=suite,
            platforms=platforms or ["linux/amd64", "linux/arm64"],
            mirror=mirror,
            refresh=refresh,
        ):
            made = line.get("result", made)
            if "progress" in line:
                note(line["progress"])
    if as_json:
        print_json(made)
        return
    say((made["name"], "bold"))
    print_table(
        ("platform", "Python", "#size", "digest"),
        [
            (one["platform"], one["python"], size(one["size_bytes"]), one["digest"][7:19])
            for one in made["platforms"]
        ],
        "",
    )
    say(("next     ", "default"), ("FLOPS_BASE_IMAGE=" + made["name"], "cyan"), ("  builds on it", "dim"))
