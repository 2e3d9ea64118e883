"""An image registry of our own: Debian's docker-registry, as a private program that keeps all in one folder.

It is started by whoever starts the other services; this module says how, and tidies the folder.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from flops.core.disk import disk_full, is_full
from flops.core.errors import InvalidInputError
from flops.images.locks import write_atomically

PROGRAM = "docker-registry"
STALE_S = 3600.0
"""How long an upload that nobody goes on with keeps its space."""


def registry_installed(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where docker-registry is; None: it is not installed (Debian: ``apt install docker-registry``)."""
    found = shutil.which(PROGRAM, path=f"{environment.get('PATH', os.defpath)}:/usr/bin")
    return Path(found) if found else None


def registry_command(
    folder: Path,
    host: str,
    port: int,
    *,
    htpasswd: Path | None = None,
    certificate: tuple[Path, Path] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """How to start a registry; its configuration is written first.

    Args:
        folder: where everything of it lies; made when missing, and for this user only.
        host: the address to listen on, such as ``127.0.0.1``.
        htpasswd: users and their passwords (bcrypt); None: whoever gets there may do everything.
        certificate: of the server, and its key; None: plain HTTP.
    Returns:
        the command, and the environment for it.
    Raises:
        InvalidInputError: docker-registry is not installed.
        DiskFullError: no space is left for its configuration.
    """
    program = registry_installed(environment)
    if program is None:
        raise InvalidInputError(
            "docker-registry is not installed - run 'apt install docker-registry', "
            "or name another registry in FLOPS_REGISTRY"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        forget_stale_uploads(folder)
        file = folder / "config.yml"
        configuration = _configuration(folder, host, port, htpasswd, certificate)
        # JSON is YAML; and nothing in a path can be taken for anything else.
        text = json.dumps(configuration, indent=1) + "\n"
        # On a full disk a registry must start all the same: that is how space is freed.
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_atomically(file, text)
    except OSError as error:
        if is_full(error):
            raise disk_full(folder, "the image registry") from error
        raise
    return [str(program), "serve", str(file)], {"PATH": os.defpath, "OTEL_TRACES_EXPORTER": "none"}


def collect_command(folder: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """How to free the space of deleted images; the registry must not run meanwhile.

    Untagged manifests are kept: in 2.8 they may be parts of an index.
    """
    return [str(registry_installed(environment) or PROGRAM), "garbage-collect", str(folder / "config.yml")]


def forget_stale_uploads(folder: Path, older_than_s: float = STALE_S) -> int:
    """Remove uploads that broke off, such as when the disk was full; gives how many bytes.

    docker-registry 2.8 can neither go on with an upload that broke off inside a chunk nor be asked to forget
    it, and its own tidying begins up to an hour after its start. Those that somebody wrote to within
    ``older_than_s`` stay; the registry may run.
    """
    freed, before = 0, time.time() - older_than_s
    repositories = folder / "storage" / "docker" / "registry" / "v2" / "repositories"
    for uploads in repositories.rglob("_uploads"):
        for upload in uploads.iterdir():
            with suppress(FileNotFoundError):
                files = [path.stat() for path in upload.rglob("*") if path.is_file()]
                if all(status.st_mtime <= before for status in files):
                    shutil.rmtree(upload)
                    freed += sum(status.st_size for status in files)
    return freed


def _configuration(
    folder: Path, host: str, port: int, htpasswd: Path | None, certificate: tuple[Path, Path] | None
) -> dict[str, object]:
    http: dict[str, object] = {
        "addr": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        # Uploads that were begun before a restart are known by it.
        "secret": _secret(folder),
        "relativeurls": True,
        "headers": {"X-Content-Type-Options": ["nosniff"]},
    }
    if certificate is not None:
        http["tls"] = {"certificate": str(certificate[0]), "key": str(certificate[1])}
    configuration: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "storage")},
            "delete": {"enabled": True},
            "maintenance": {
                "uploadpurging": {"enabled": True, "age": "1h", "interval": "1h", "dryrun": False}
            },
        },
        "http": http,
    }
    if htpasswd is not None:
        configuration["auth"] = {"htpasswd": {"realm": "flops", "path": str(htpasswd)}}
    return configuration


def _secret(folder: Path) -> str:
    file = folder / "secret"
    try:
        return file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        secret = secrets.token_hex(32)
        write_atomically(file, secret + "\n")
        return secret
