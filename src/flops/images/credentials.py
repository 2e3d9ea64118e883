"""Credentials for image registries and their authorities, found where docker and podman keep them.

Nothing is stored here. Helpers (``docker-credential-NAME get``) are started without a shell and told the
registry on their standard input.
"""

import base64
import binascii
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flops.core.errors import FailedError, InvalidInputError
from flops.images.references import PUBLIC_HUB

_HUB_KEY = "https://index.docker.io/v1/"
_HELPER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,60}")
_HELPER_TIMEOUT_S = 30.0
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Credentials:
    """What proves to a registry who is asking."""

    username: str
    password: str = field(repr=False)
    source: str = "the caller"
    """Where they were found, for people."""
    identity_token: str | None = field(default=None, repr=False)
    """To be exchanged for tokens, in place of a password."""
    registry_token: str | None = field(default=None, repr=False)
    """A token that the registry takes as it is."""


def find_credentials(host: str, environment: Mapping[str, str] = os.environ) -> Credentials | None:
    """The user's credentials for a registry; None: there are none.

    Looked for in the file that REGISTRY_AUTH_FILE names, then in ``config.json`` of the folder that
    DOCKER_CONFIG names (without it ``~/.docker``). In each: ``credHelpers`` for this registry,
    ``credsStore``, ``auths``.

    Raises:
        InvalidInputError: a file or entry is broken, or a helper that it names is not installed.
        FailedError: a helper failed.
    """
    for file in _files(environment):
        configuration = _read(file)
        if configuration is None:
            continue
        found = _from_helper(configuration, file, host, environment)
        if found is None:
            found = _from_auths(configuration, file, host)
        if found is not None:
            return found
    return None


def find_authority(host: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The authority of a registry's certificate, where engines look for it: ``certs.d/HOST[:PORT]/ca.crt`` in
    ``~/.config/docker``, ``/etc/docker`` or ``/etc/containers``; None: it is not there.
    """
    folders = [Path("/etc/docker"), Path("/etc/containers")]
    if environment.get("HOME"):
        folders.insert(0, Path(environment["HOME"]) / ".config" / "docker")
    if "/" in host:
        return None
    return next(
        (file for folder in folders if (file := folder / "certs.d" / host / "ca.crt").is_file()), None
    )


def _files(environment: Mapping[str, str]) -> Iterator[Path]:
    if named := environment.get("REGISTRY_AUTH_FILE"):
        yield Path(named).expanduser()
    if folder := environment.get("DOCKER_CONFIG"):
        yield Path(folder).expanduser() / "config.json"
    elif home := environment.get("HOME"):
        yield Path(home) / ".docker" / "config.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidInputError(f"{file} has more than {_MAX_FILE_BYTES} bytes - mend it")
        value = json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{file}, which holds credentials for registries, cannot be read - mend it, "
            "or run 'docker login' again"
        ) from error
    if not isinstance(value, dict):
        raise InvalidInputError(f"{file} does not hold a JSON object - mend it, or run 'docker login' again")
    return value


def _from_helper(
    configuration: Mapping[str, Any], file: Path, host: str, environment: Mapping[str, str]
) -> Credentials | None:
    helpers = configuration.get("credHelpers")
    for key in _keys(host):
        if isinstance(helpers, dict) and helpers.get(key):
            return _ask(helpers[key], key, file, environment)
    store = configuration.get("credsStore")
    if store:
        return _ask(store, _keys(host)[0], file, environment)
    return None


def _ask(name: object, server: str, file: Path, environment: Mapping[str, str]) -> Credentials | None:
    if not isinstance(name, str) or not _HELPER.fullmatch(name):
        raise InvalidInputError(f"'{str(name)[:60]}' in {file} cannot name a credential helper - mend it")
    program = f"docker-credential-{name}"
    path = shutil.which(program, path=environment.get("PATH", os.defpath))
    if path is None:
        raise InvalidInputError(
            f"{file} names the credential helper {program}, which is not on PATH - install it, "
            f"or take it out of the file"
        )
    try:
        finished = subprocess.run(
            [path, "get"],
            input=server.encode(),
            capture_output=True,
            env=dict(environment),
            timeout=_HELPER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FailedError(
            f"the credential helper {program} cannot be asked for {server}: {type(error).__name__} - "
            f"try 'echo {server} | {program} get'"
        ) from error
    if finished.returncode:
        if b"credentials not found" in finished.stdout + finished.stderr:
            return None
        said = (finished.stderr or finished.stdout).decode("utf-8", "replace").strip()
        raise FailedError(
            f"the credential helper {program} failed for {server}: {' '.join(said.split())[:200]} - "
            f"try 'echo {server} | {program} get'"
        )
    try:
        answer = json.loads(finished.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FailedError(f"the credential helper {program} gave no credentials for {server}") from error
    if username == "<token>":
        return Credentials("", "", program, identity_token=secret)
    return Credentials(username, secret, program)


def _from_auths(configuration: Mapping[str, Any], file: Path, host: str) -> Credentials | None:
    auths = configuration.get("auths")
    if not isinstance(auths, dict):
        return None
    named = {_plain(key): value for key, value in auths.items()}
    entry = next((named[key] for key in map(_plain, _keys(host)) if named.get(key)), None)
    if entry is None:
        return None
    try:
        token, registry_token = entry.get("identitytoken"), entry.get("registrytoken")
        if entry.get("auth"):
            decoded = base64.b64decode(entry["auth"], validate=True).decode()
            username, colon, password = decoded.partition(":")
            if not colon:
                raise ValueError("no colon")
        else:
            username, password = str(entry.get("username", "")), str(entry.get("password", ""))
    except (AttributeError, TypeError, ValueError, binascii.Error) as error:
        raise InvalidInputError(
            f"the entry of registry {host} in {file} is broken - run 'docker login {host}' again"
        ) from error
    if not (username or token or registry_token):
        return None
    return Credentials(
        username,
        password.rstrip("\0"),
        str(file),
        str(token) if token else None,
        str(registry_token) if registry_token else None,
    )


def _keys(host: str) -> tuple[str, ...]:
    """The names under which a registry's entry is looked for, the usual one first."""
    return (_HUB_KEY, PUBLIC_HUB, "index.docker.io") if host == PUBLIC_HUB else (host, f"https://{host}")


def _plain(key: str) -> str:
    """``https://host/v1/`` and ``host`` are one name in ``auths``."""
    return re.sub(r"^https?://|/(v[12]/?)?$", "", key)
