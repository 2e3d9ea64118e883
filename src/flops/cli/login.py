"""A manager elsewhere: where it is, how it proves itself, and the token that opens it.

Kept in ``login.json`` of the FLOPS_HOME (mode 600), or given by FLOPS_MANAGER, FLOPS_TOKEN, FLOPS_MANAGER_CA.
The manager's authority is trusted once its fingerprint was compared, and nothing else is trusted for it.
"""

import hashlib
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flops.core.errors import InvalidInputError, UnavailableError
from flops.core.settings import Settings

_FILE = "login.json"
_MAX_PEM_BYTES = 64 << 10


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
    file = settings.home / _FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Login(str(kept["url"]), str(kept["token"]), kept.get("ca"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{file} cannot be read ({error}) - sign in again with 'flops login'"
        ) from error


def keep(settings: Settings, login: Login) -> Path:
    """Let commands talk to this manager from now on."""
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = settings.home / _FILE
    aside = file.with_name(f".{_FILE}.new")
    aside.unlink(missing_ok=True)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as target:
        json.dump(asdict(login), target, indent=1)
    aside.replace(file)
    return file


def forget(settings: Settings) -> bool:
    """Let commands talk to this FLOPS_HOME's own manager again; False: they did."""
    try:
        (settings.home / _FILE).unlink()
    except FileNotFoundError:
        return False
    return True


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


def ask_for_authority(url: str) -> str:
    """The authority that a manager says is its own, not to be trusted before its fingerprint was compared.

    Raises:
        UnavailableError: nobody answers there, or it has none.
    """
    import httpx

    try:
        # Nothing secret is sent or believed here: what comes back is compared by its fingerprint.
        with httpx.Client(verify=False, timeout=10.0, trust_env=False) as client:  # noqa: S501
            answer = client.get(f"{url}/v1/authority")
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"the manager at {url} cannot be reached: {error} - is it 'flops up --listen'?"
        ) from error
    if answer.status_code != 200 or len(answer.content) > _MAX_PEM_BYTES:
        raise UnavailableError(f"what answers at {url} has no authority to show - is that a manager?")
    return answer.text


def fingerprint(pem: str) -> str:
    """SHA-256 of a certificate, as other tools write it.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    except ValueError as error:
        raise InvalidInputError(f"that is no certificate: {error}") from error
    return ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))
