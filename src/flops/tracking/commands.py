"""How the tracking processes are started; importing this costs nothing of MLflow.

Each command is meant for a service of the orchestrator, together with `tracking_environment`.
"""

import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from flops.core.errors import InvalidInputError

GUI_PREFIX = "/mlflow"
"""Of every path that MLflow's GUI serves."""
GUI_SOCKET = "mlflow.sock"
SECRET_HEADER = "x-flops-secret"  # noqa: S105 - its name
AUDIENCES_HEADER = "x-flops-audiences"
"""Whose a request is: audiences, with commas between them, or one of these two."""
EVERYTHING = "*"
"""Of whoever may read whatever there is."""
CHANGES = "!"
"""Of whoever may change things too."""


def tracking_environment() -> dict[str, str]:
    """Variables for every process that imports MLflow: no telemetry, no side processes of its server."""
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Jobs are for evaluating language models; they cost one process and a queue in /dev/shm.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        # MLflow looks for a git executable at import and complains without one.
        "GIT_PYTHON_REFRESH": "quiet",
    }


def recorder_command(
    spool: Path, tracking_uri: str, artifacts: Path | str, ready_file: Path | None = None
) -> list[str]:
    """The recorder as a service; it is safe to kill at any time, and waits for another one to end."""
    command = [sys.executable, "-m", "flops.tracking.recorder", "--spool", str(spool)]
    command += ["--tracking-uri", tracking_uri, "--artifacts", str(artifacts)]
    return command + (["--ready-file", str(ready_file)] if ready_file else [])


def gui_command(
    tracking_uri: str, artifacts: Path | str, folder: Path, secret_file: Path, idle_s: float = 1800.0
) -> list[str]:
    """MLflow's own server over the same store, for its GUI; see `flops.tracking.gui`.

    Args:
        folder: private; the server listens at `GUI_SOCKET` in it.
        secret_file: what every request has to bring.
        idle_s: it ends when nobody has asked for so long.
    Raises:
        InvalidInputError: the store is a server already, which has a GUI of its own.
    """
    if is_server(tracking_uri):
        raise InvalidInputError(
            f"the tracking store is the MLflow server {shown(tracking_uri)} - open that address"
        )
    command = [sys.executable, "-P", "-m", "flops.tracking.gui", "--tracking-uri", tracking_uri]
    command += ["--artifacts", str(artifacts), "--folder", str(folder)]
    return [*command, "--secret-file", str(secret_file), "--idle-s", f"{idle_s:g}"]


def is_server(tracking_uri: str) -> bool:
    """Whether an MLflow server owns the store (and decides where artifacts go)."""
    return urlsplit(tracking_uri).scheme in ("http", "https")


def artifact_root(artifacts: Path | str) -> str:
    """A folder or an address such as ``s3://bucket/folder``, as an address."""
    text = str(artifacts)
    return text if "://" in text else Path(text).absolute().as_uri()


def without_secrets(text: str) -> str:
    """A message of somebody else's without the user names and passwords of addresses in it."""
    return re.sub(r"(\w://)[^\s/@]+@", r"\1", text)


def shown(uri: str) -> str:
    """An address fit for messages: without user name, password and query."""
    parts = urlsplit(uri)
    if not parts.hostname:
        return uri.split("?")[0]
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"
