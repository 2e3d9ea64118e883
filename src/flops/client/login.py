"""Which manager programs of this machine talk to, where it is not this FLOPS_HOME's own.

Kept in ``login.json`` of the FLOPS_HOME (mode 600), or given by FLOPS_MANAGER, FLOPS_TOKEN, FLOPS_MANAGER_CA.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flops.client.address import local_address, local_token
from flops.core.errors import FlopsError, InvalidInputError, UnavailableError
from flops.core.settings import Settings

LOGIN_FILE = "login.json"


@dataclass(frozen=True)
class Login:
    """One manager elsewhere."""

    url: str
    token: str
    ca: str | None = None
    """PEM text of its authority; None: what this machine trusts."""


def find_login(settings: Settings, environment: Mapping[str, str] = os.environ) -> Login | None:
    """The manager that commands talk to instead of this FLOPS_HOME's own; None: they talk to that.

    Raises:
        InvalidInputError: what was given or kept cannot be read.
    """
    if url := environment.get("FLOPS_MANAGER"):
        ca = environment.get("FLOPS_MANAGER_CA")
        try:
            pem = Path(ca).read_text(encoding="ascii") if ca else None
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"FLOPS_MANAGER_CA names '{ca}', which cannot be read: {error}"
            ) from error
        return Login(checked_url(url), environment.get("FLOPS_TOKEN", ""), pem)
    file = settings.home / LOGIN_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Login(str(kept["url"]), str(kept["token"]), kept.get("ca"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{file} cannot be read ({error}) - sign in again with 'flops login'"
        ) from error


def checked_url(text: str) -> str:
    """A manager's address without a path.

    Raises:
        InvalidInputError: it is none, or would send the token in the clear to another machine.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text if "://" in text else f"https://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInputError(f"'{text[:80]}' is no address of a manager: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.path.strip("/"):
        raise InvalidInputError(f"'{text[:80]}' is no address of a manager - use https://HOST:PORT")
    if parts.scheme == "http" and host not in ("127.0.0.1", "localhost", "::1"):
        raise InvalidInputError(f"'{text[:80]}' would send the token in the clear - use https://")
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{name}" + (f":{port}" if port is not None else "")


def whom_to_ask() -> Login:
    """The manager that one is signed in to, else this FLOPS_HOME's own.

    Raises:
        UnavailableError: no manager runs on this FLOPS_HOME.
        UnauthorizedError: its token cannot be read.
    """
    settings = Settings.from_environment()
    if (found := find_login(settings)) is not None:
        return found
    address = local_address(settings)
    if address is None:
        raise UnavailableError(f"no manager runs on {settings.home} - start it with 'flops up'")
    return Login(address.url, local_token(settings))


def where_now() -> str | None:
    """The address of `whom_to_ask`, which another manager may have taken over; None: there is none."""
    with suppress(FlopsError, ValueError):
        return whom_to_ask().url
    return None
