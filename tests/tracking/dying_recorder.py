"""Run by test_crashes.py: ships one spool again and again, dying after each of its calls to MLflow in turn.

    python dying_recorder.py HOME FOLDER

HOME has a prepared mlflow.db and a spool. Leaves FOLDER/reference (shipped undisturbed) and FOLDER/1,
FOLDER/2, ... (killed after that call, then shipped by a second process), and prints the number of calls as
its last line. Children are forked after MLflow's import, so an attempt costs 0.3 s instead of 3 s.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - paid once, before forking

from flops.tracking import Spool, open_store
from flops.tracking.recorder import Recorder
from flops.tracking.shipping import Shipper


class DyingClient:
    """MlflowClient that counts calls and kills its own process right after one of them took effect."""

    def __init__(self, client: Any, last_call: int | None) -> None:
        self._client = client
        self._last_call = last_call
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            finally:
                self.calls += 1
                if self.calls == self._last_call:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call


def ship(home: Path, last_call: int | None) -> int:
    client = DyingClient(open_store(f"sqlite:///{home / 'mlflow.db'}", home / "artifacts"), last_call)
    spool = Spool(home / "spool")
    recorder = Recorder(spool, lambda: shipper, destination="here")
    shipper = Shipper(client, home / "artifacts")
    assert recorder.ship_all(shipper) is None
    return client.calls


def in_child(home: Path, last_call: int | None, report: Path) -> bool:
    """Ship in a forked process; false if it was killed."""
    child = os.fork()
    if child == 0:
        report.write_text(str(ship(home, last_call)))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def copy(home: Path, destination: Path) -> Path:
    destination.mkdir()
    shutil.copy(home / "mlflow.db", destination)
    shutil.copytree(home / "spool", destination / "spool")
    return destination


def main(home: Path, folder: Path) -> None:
    report = folder / "calls"
    assert in_child(copy(home, folder / "reference"), None, report)
    calls = int(report.read_text())
    for number in range(1, calls + 1):
        attempt = copy(home, folder / str(number))
        assert not in_child(attempt, number, report)
        assert in_child(attempt, None, report)
    print(calls)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
