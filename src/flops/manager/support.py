"""The manager's own services: data server, recorder and, from the first request for it on, MLflow's GUI.

They are services of the same orchestrator as everything else, so they outlive a manager that is killed, and
the next one finds them.
"""

import logging
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from flops.core.errors import UnavailableError
from flops.core.ids import ServiceName
from flops.core.settings import Settings
from flops.manager.paths import data_token_file, read_or_make_token
from flops.orchestration import Orchestrator, ServiceSpec, deploy_in_place
from flops.telemetry import said
from flops.tracking import (
    AUDIENCES_HEADER,
    EVERYTHING,
    GUI_PREFIX,
    GUI_SOCKET,
    SECRET_HEADER,
    gui_command,
    is_server,
    recorder_command,
    tracking_environment,
)

log = logging.getLogger(__name__)

OWNER = "flops"
_DATA = ServiceName("flops-data")
_RECORDER = ServiceName("flops-recorder")
_GUI = ServiceName("flops-gui")
_READY_TIMEOUT_S = 20.0
_GUI_TIMEOUT_S = 90.0
_GUI_IDLE_S = 1800.0
_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True)
class GuiDoor:
    """Where MLflow's GUI answers whoever brings the secret."""

    socket: Path
    secret: str = field(repr=False)

    def headers(self, audiences: str) -> dict[str, str]:
        """Of a request for somebody who is part of some audiences, see `flops.tracking.visibility`."""
        return {SECRET_HEADER: self.secret, AUDIENCES_HEADER: audiences}


class Support:
    """Keeps the manager's services running. Safe from any thread.

    Args:
        orchestrator: runs programs of this machine.
        data: whether this machine's data server is one of them.
    """

    def __init__(self, settings: Settings, orchestrator: Orchestrator, *, data: bool = True) -> None:
        self._settings = settings
        self._data = data
        self._orchestrator = orchestrator
        self._lock = threading.Lock()
        self._data_ready = settings.run_dir / "data.ready"
        self._gui_dir = settings.run_dir / "gui"
        self._gui_door: GuiDoor | None = None

    def ensure(self, *, recorder: bool = True) -> None:
        """The data server runs and answers; the recorder runs.

        Args:
            recorder: whether there is anything to record: MLflow costs seconds to load and 230 MB to hold.
        Raises:
            UnavailableError: the data server does not get ready.
        """
        with self._lock:
            read_or_make_token(data_token_file(self._settings))
            if self._data:
                self._deploy(_DATA, "data", self._data_command())
            if recorder:
                self._deploy(_RECORDER, "recorder", self._recorder_command(), nice=5)
        if not self._data:
            return
        deadline = time.monotonic() + _READY_TIMEOUT_S
        # A file system tells of nothing by itself; this is waited for once in the data server's life.
        while not self._data_ready.exists():
            if time.monotonic() > deadline:
                lines = self._orchestrator.logs(_DATA, 4096).strip().splitlines()
                raise UnavailableError(
                    f"the data server is not ready after {_READY_TIMEOUT_S:g} s"
                    f"{': ' + said(lines[-1]) if lines else ''} - see {self._settings.logs_dir}"
                )
            time.sleep(_LOOK_AGAIN_S)

    @property
    def gui_address(self) -> str:
        """Of MLflow's GUI: a path of this manager's, or a server elsewhere that is the tracking store."""
        uri = self._settings.mlflow_uri
        return uri.rstrip("/") if is_server(uri) else GUI_PREFIX

    @property
    def gui_door(self) -> GuiDoor:
        """Where it answers, if it runs."""
        if self._gui_door is None:
            secret = read_or_make_token(self._settings.run_dir / "gui.token")
            self._gui_door = GuiDoor(self._gui_dir / GUI_SOCKET, secret)
        return self._gui_door

    def start_gui(self) -> None:
        """MLflow's GUI runs and answers; it is started where it does not, and ends when nobody asks for long.

        Raises:
            UnavailableError: it does not get ready.
        """
        if is_server(self._settings.mlflow_uri):
            return
        door = self.gui_door
        deadline = time.monotonic() + _GUI_TIMEOUT_S
        while not _answers(door):
            with self._lock:
                self._deploy(_GUI, "gui", self._gui_command())
            if time.monotonic() > deadline:
                raise UnavailableError(f"MLflow's GUI does not answer - see {self._settings.logs_dir}")
            time.sleep(0.1)

    def check_recorder(self) -> None:
        """Raises: UnavailableError: the recorder does not run."""
        statuses = self._orchestrator.list(OWNER)
        if not any(status.name == _RECORDER and status.state == "running" for status in statuses):
            raise UnavailableError(
                "the recorder does not run; what is tracked waits in the spool - see "
                f"{self._settings.logs_dir}"
            )

    def stop(self) -> None:
        """None of them is left."""
        with self._lock:
            live = [status.name for status in self._orchestrator.list(OWNER) if status.live]
            self._orchestrator.stop_many(live, grace_s=3.0)

    def _deploy(self, name: ServiceName, role: str, command: list[str], *, nice: int = 0) -> None:
        spec = ServiceSpec(
            name=name,
            command=tuple(command),
            role=role,
            project=OWNER,
            environment=tracking_environment(),
            directory=self._settings.run_dir,
            restart="on-failure",
            max_restarts=1_000_000,  # they are needed for as long as the manager is
            nice=nice,
        )
        deploy_in_place(self._orchestrator, spec)

    def _data_command(self) -> list[str]:
        settings = self._settings
        command = [sys.executable, "-P", "-m", "flops.data.server"]
        command += ["--root", str(settings.data_dir), "--socket", str(settings.data_socket)]
        command += ["--token-file", str(data_token_file(settings))]
        return [*command, "--ready-file", str(self._data_ready)]

    def _recorder_command(self) -> list[str]:
        settings = self._settings
        return recorder_command(settings.spool_dir, settings.mlflow_uri, settings.mlflow_artifacts_dir)

    def _gui_command(self) -> list[str]:
        settings = self._settings
        secret_file = settings.run_dir / "gui.token"
        return gui_command(
            settings.mlflow_uri, settings.mlflow_artifacts_dir, self._gui_dir, secret_file, _GUI_IDLE_S
        )


def _answers(door: GuiDoor) -> bool:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(door.socket)), timeout=5.0) as client:
            url = f"http://localhost{GUI_PREFIX}/health"
            return client.get(url, headers=door.headers(EVERYTHING)).status_code == 200
    except httpx.HTTPError:
        return False
