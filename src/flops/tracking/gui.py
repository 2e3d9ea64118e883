"""MLflow's own server, for the manager alone: its GUI and its REST API, to be read.

    python -m flops.tracking.gui --tracking-uri URI --artifacts DIR --folder DIR --secret-file FILE

It listens on the Unix socket `GUI_SOCKET` in a private folder and answers only who brings the secret; who is
behind a request, and thereby what they see, stands in a header (`flops.tracking.visibility`). It is MLflow's
application with its access control, in one process instead of the command's two; the names of the variables
below are MLflow's own between those two. It ends by itself when nobody has asked for a while.
"""

import argparse
import asyncio
import hmac
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

from flops.tracking.commands import (
    GUI_PREFIX,
    GUI_SOCKET,
    SECRET_HEADER,
    artifact_root,
    tracking_environment,
)
from flops.tracking.visibility import ADMIN

_LOOK_S = 5.0

_CONFIGURATION = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{database}
admin_username = {admin}
authorization_function = flops.tracking.visibility:authenticate
grant_default_workspace_access = false
"""


class Door:
    """Lets in who brings the secret, and notes when somebody was there last."""

    def __init__(self, app: Any, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()
        self._inside = 0
        self._left = time.monotonic()

    @property
    def idle_s(self) -> float:
        return 0.0 if self._inside else time.monotonic() - self._left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(SECRET_HEADER.encode(), b"")
        if not hmac.compare_digest(given, self._secret):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"MLflow is behind the manager."})
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1
            self._left = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.tracking.gui", description=__doc__)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--artifacts", required=True, help="a folder or an address")
    parser.add_argument("--folder", type=Path, required=True, help="private; its socket and its own files")
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--idle-s", type=float, default=1800.0)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    folder: Path = options.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secret = options.secret_file.read_text().strip()
    if not secret:
        parser.error(f"{options.secret_file} is empty")
    os.environ.update(_environment(options.tracking_uri, options.artifacts, folder))
    listener = _listen(folder / GUI_SOCKET)
    asyncio.run(_serve(listener, secret, options.idle_s))
    return 0


async def _serve(listener: socket.socket, secret: str, idle_s: float) -> None:
    import uvicorn
    from mlflow.server.auth import create_app

    door = Door(create_app(), secret)
    server = uvicorn.Server(
        uvicorn.Config(door, ws="none", access_log=False, server_header=False, log_level="warning")
    )

    async def end_when_idle() -> None:
        while door.idle_s < idle_s:
            await asyncio.sleep(min(_LOOK_S, idle_s))
        server.should_exit = True

    watching = asyncio.create_task(end_when_idle())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()


def _environment(tracking_uri: str, artifacts: str, folder: Path) -> dict[str, str]:
    database = folder / "permissions.db"
    for file in folder.glob(f"{database.name}*"):  # with the tags gone by now, they may be wrong
        file.unlink()
    configuration = folder / "mlflow.ini"
    configuration.write_text(_CONFIGURATION.format(database=database, admin=ADMIN))
    location = artifact_root(artifacts)
    return tracking_environment() | {
        "_MLFLOW_SERVER_FILE_STORE": tracking_uri,
        "_MLFLOW_SERVER_REGISTRY_STORE": tracking_uri,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": location,
        "_MLFLOW_STATIC_PREFIX": GUI_PREFIX,
        "_MLFLOW_SGI_NAME": "uvicorn",
        "MLFLOW_TRACKING_URI": tracking_uri,
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.token_urlsafe(32),  # nobody ever signs in with it
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_SERVER_ENABLE_GRAPHQL_AUTH": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "localhost",
    }


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


if __name__ == "__main__":
    sys.exit(main())
