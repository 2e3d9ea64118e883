"""Signing in at a manager elsewhere: where it is, how it proves itself, and the token that opens it.

`flops.client.login` says where that is kept. The manager's authority is trusted once its fingerprint was
compared, and nothing else is trusted for it.
"""

import hashlib
import json
import os
import ssl
from dataclasses import asdict
from pathlib import Path

from flops.client.login import LOGIN_FILE, Login
from flops.core.errors import InvalidInputError, UnavailableError
from flops.core.settings import Settings

_MAX_PEM_BYTES = 64 << 10


def keep(settings: Settings, login: Login) -> Path:
    """Let commands talk to this manager from now on."""
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = settings.home / LOGIN_FILE
    aside = file.with_name(f".{LOGIN_FILE}.new")
    aside.unlink(missing_ok=True)
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as target:
        json.dump(asdict(login), target, indent=1)
    aside.replace(file)
    return file


def forget(settings: Settings) -> bool:
    """Let commands talk to this FLOPS_HOME's own manager again; False: they did."""
    try:
        (settings.home / LOGIN_FILE).unlink()
    except FileNotFoundError:
        return False
    return True


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
