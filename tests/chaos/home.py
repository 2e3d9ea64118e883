"""One FLOPS_HOME under test: its manager, its projects, and what it has written down.

State is read from the database itself, which answers while the manager is dead as well.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
from psycopg.types.string import TextLoader

from flops.cli import launch
from flops.client import Client
from flops.client.address import Address
from flops.core.settings import Settings
from tests.chaos.repository import TAG, make_table
from tests.postgres import PostgresServer

TERMINAL = ("finished", "failed", "stopped")


class Home:
    """A FLOPS_HOME; the manager runs with ``environment`` added to ours."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.settings = Settings(home=folder)
        self.command = [
            *("env", *(f"{name}={value}" for name, value in (environment or {}).items())),
            *(sys.executable, "-P", "-m", "flops.manager"),
        ]
        self.marker = hashlib.sha256(str(self.settings.services_dir.resolve()).encode()).hexdigest()[:12]

    def client(self) -> Client:
        """The manager, started where none runs, as any command would."""
        return launch.ensure(self.settings, command=self.command)

    def manager_pid(self) -> int | None:
        """The living manager; None where there is none."""
        try:
            pid = int(json.loads(self.settings.address_file.read_text())["pid"])
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, KeyError):
            return None
        ours = b"flops.manager" in command and os.fsencode(self.settings.home) in command
        return pid if ours else None

    def put_data(self, sites: int) -> None:
        with self.client() as client, tempfile.TemporaryFile() as file:
            for site in range(sites):
                file.seek(0)
                file.truncate()
                pq.write_table(make_table(site), file)
                file.seek(0)
                client.put_fragment(file, tag=[TAG], site=f"site-{site}")

    def submit(self, spec: Mapping[str, Any]) -> str:
        with self.client() as client:
            return str(client.submit_project(spec=spec)["id"])

    def end(self, timeout_s: float = 60.0) -> None:
        """Stop everything of this home, whatever state it is in."""
        with self.client() as client:
            pid = self.manager_pid()
            client.shut_down(force=True)
        deadline = time.monotonic() + timeout_s
        while pid is not None and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            self.reap()

    def reap(self) -> None:
        """Managers that died are our children."""
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass

    # what is written down

    def query(self, sql: str, *values: Any, file: Path | None = None) -> list[tuple[Any, ...]]:
        path = file or self.settings.database
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=20)) as database:
            return database.execute(sql, values).fetchall()

    def state(self, project: str) -> tuple[str, str | None]:
        """Its state and the reason of it."""
        ((state, reason),) = self.query("select state, reason from projects where id = ?", project)
        return state, reason

    def over(self, project: str) -> bool:
        return self.state(project)[0] in TERMINAL

    def wait(self, project: str, timeout_s: float) -> str:
        """Wait for the project's end, with a manager running.

        Raises:
            TimeoutError: it takes longer.
        """
        deadline = time.monotonic() + timeout_s
        while not self.over(project):
            if time.monotonic() > deadline:
                raise TimeoutError(f"project {project} is {self.state(project)} after {timeout_s:g} s")
            time.sleep(0.1)
        return self.state(project)[0]

    def events(self, project: str, *kinds: str) -> list[dict[str, Any]]:
        """Events in order, each with its time and kind beside its data."""
        rows = self.query("select time, kind, data from events where project = ? order by seq", project)
        return [
            {"time": time_, "kind": kind, **json.loads(data)}
            for time_, kind, data in rows
            if not kinds or kind in kinds
        ]

    def project_folder(self, project: str) -> Path:
        return self.settings.projects_dir / project


class HomeOnPostgres(Home):
    """Its manager's rows are on the server; they can be read while that is there."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self._server = server
        self.url = server.database()
        super().__init__(folder, {"FLOPS_DATABASE": self.url})

    def query(self, sql: str, *values: Any, file: Path | None = None) -> list[tuple[Any, ...]]:
        if file is not None:
            return super().query(sql, *values, file=file)
        with contextlib.closing(psycopg.connect(self.url)) as connection:
            connection.adapters.register_loader("json", TextLoader)
            return connection.execute(sql.replace("?", "%s").encode(), values).fetchall()

    def stand_by(self) -> Address:
        """One more manager: it waits, or acts where no other does."""
        return launch.start_standby(self.settings, command=self.command)
