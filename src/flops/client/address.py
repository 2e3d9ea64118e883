"""Where the manager of a FLOPS_HOME says that it is."""

import json
from dataclasses import dataclass
from pathlib import Path

from flops.core.errors import UnauthorizedError
from flops.core.settings import Settings


@dataclass(frozen=True)
class Address:
    """``pid`` is the process that wrote it; it may have been killed since."""

    url: str
    pid: int


def local_address(settings: Settings) -> Address | None:
    """None: no manager has said anything, or one was killed while it did."""
    return _read(settings.address_file)


def standby_addresses(settings: Settings) -> list[Address]:
    """Of managers that stand by, as far as they have not been killed since."""
    found = [_read(file) for file in sorted(settings.standby_dir.glob("*.json"))]
    return [address for address in found if address is not None]


def _read(file: Path) -> Address | None:
    try:
        value = json.loads(file.read_text())
        return Address(url=str(value["url"]), pid=int(value["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def local_token(settings: Settings) -> str:
    """Raises: UnauthorizedError: the token cannot be read."""
    try:
        return settings.token_file.read_text().strip()
    except OSError as error:
        raise UnauthorizedError(
            f"the token of the manager cannot be read ({error}) - only the user who started it can use it"
        ) from error
