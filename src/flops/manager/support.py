"""The manager's own services: data server, recorder and, on request, MLflow's GUI.

They are services of the same orchestrator as everything else, so they outlive a manager that is killed, and
the next one finds them.
"""

import logging
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

from flops.core.errors import UnavailableError
from flops.core.ids import ServiceName
from flops.core.settings import Settings
from flops.manager.paths import data_token_file, read_or_make_token
from flops.orchestration import Orchestrator, ServiceSpec, deploy_in_place
from flops.tracking import recorder_command, tracking_environment, ui_command

log = logging.getLogger(__name__)

OWNER = "flops"
_DATA = ServiceName("flops-data")
_RECORDER = ServiceName("flops-recorder")
_UI = ServiceName("flops-ui")
_READY_TIMEOUT_S = 20.0
_UI_TIMEOUT_S = 90.0
_LOOK_AGAIN_S = 0.02


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
                self._deploy(_RECORDER, "recorder", self._recorder_command())
        if not self._data:
            return
        deadline = time.monotonic() + _READY_TIMEOUT_S
        # A file system tells of nothing by itself; this is waited for once in the data server's life.
        while not self._data_ready.exists():
            if time.monotonic() > deadline:
                lines = self._orchestrator.logs(_DATA, 4096).strip().splitlines()
                raise UnavailableError(
                    f"the data server is not ready after {_READY_TIMEOUT_S:g} s"
                    f"{': ' + lines[-1] if lines else ''} - see {self._settings.logs_dir}"
                )
            time.sleep(_LOOK_AGAIN_S)

    def ui(self) -> str:
        """The address of MLflow's GUI, which is started where it does not run.

        Raises:
            UnavailableError: it does not get ready.
        """
        uri = self._settings.mlflow_uri
        if uri.startswith(("http://", "https://")):
            return uri
        with self._lock:
            url = self.ui_url()
            if url is None:
                port = _free_port()
                url = f"http://127.0.0.1:{port}"
                (self._settings.run_dir / "ui.url").write_text(url)
                self._deploy(
                    _UI, "ui", ui_command(uri, self._settings.mlflow_artifacts_dir, "127.0.0.1", port)
                )
        deadline = time.monotonic() + _UI_TIMEOUT_S
        while not _answers(url):
            if time.monotonic() > deadline or self.ui_url() is None:
                raise UnavailableError(
                    f"MLflow's GUI does not answer at {url} - see {self._settings.logs_dir}"
                )
            time.sleep(0.1)
        return url

    def ui_url(self) -> str | None:
        """Where the GUI runs; None where it does not."""
        uri = self._settings.mlflow_uri
        if uri.startswith(("http://", "https://")):
            return uri
        running = any(status.name == _UI and status.live for status in self._orchestrator.list(OWNER))
        try:
            return (self._settings.run_dir / "ui.url").read_text() if running else None
        except FileNotFoundError:
            return None

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

    def _deploy(self, name: ServiceName, role: str, command: list[str]) -> None:
        spec = ServiceSpec(
            name=name,
            command=tuple(command),
            role=role,
            project=OWNER,
            environment=tracking_environment(),
            directory=self._settings.run_dir,
            restart="on-failure",
            max_restarts=1_000_000,  # they are needed for as long as the manager is
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        # S310: the address is our own, on loopback
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as response:  # noqa: S310
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
