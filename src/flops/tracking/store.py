"""Opening MLflow: the one place that decides how FLOps talks to a tracking store."""

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flops.tracking.commands import artifact_root, is_server, tracking_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient


def open_store(tracking_uri: str, artifacts: Path | str) -> "MlflowClient":
    """A client of the store, which is made first where it is a SQLite file that does not exist.

    Costs 3 s, 4.5 s where the file is made. Changes this process's environment, as MLflow's registry looks
    the tracking store up there whatever client it was called through.

    Raises:
        Exception: whatever MLflow raises when the store is away or of another version.
    """
    for name, value in tracking_environment().items():
        os.environ.setdefault(name, value)
    # A retry of ours can be seen and has no end; one of MLflow's is silent and takes four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    if not is_server(tracking_uri):
        # Where the "Default" experiment lies, which MLflow makes with the store; ./mlruns otherwise.
        os.environ.setdefault("_MLFLOW_SERVER_ARTIFACT_ROOT", artifact_root(artifacts))
    file = sqlite_file(tracking_uri)
    if file is not None and not file.exists():
        make_sqlite_store(file)
    return _client(tracking_uri)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file behind ``sqlite:///FILE``, None for any other store."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)) if tracking_uri.startswith(prefix) else None


def make_sqlite_store(file: Path) -> None:
    """Make MLflow's tables aside and put the file in its place when it is complete.

    MLflow runs all its migrations over a new file, which takes 1.5 s and, interrupted, leaves a file that no
    later start can use. Write-ahead logging lets the GUI read while the recorder writes.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=file.parent) as folder:
        fresh = Path(folder) / file.name
        _dispose(_client(f"sqlite:///{fresh}"))
        with contextlib.closing(sqlite3.connect(fresh)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with fresh.open("rb") as content:
            os.fsync(content.fileno())
        with contextlib.suppress(FileExistsError):  # somebody else was faster: theirs counts
            file.hardlink_to(fresh)


def _client(tracking_uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
    client.search_experiments(max_results=1)
    return client


def _dispose(client: "MlflowClient") -> None:
    """Close the connections of a client of a SQL store."""
    client._tracking_client.store.engine.dispose()
