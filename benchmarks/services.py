"""Services as processes of a benchmark: started, watched, and ended whatever happens."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_END_S = 5.0


class Services:
    """Processes of one benchmark; `services` ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, name: str) -> "subprocess.Popen[bytes]":
        """Start ``python -m module`` with the configuration ``name.json`` of the folder."""
        with (self._folder / f"{name}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(self._folder / f"{name}.json")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
            )
        self._processes.append(process)
        return process

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def services(folder: Path) -> Iterator[Services]:
    """Services whose configurations and logs lie in a folder."""
    running = Services(folder)
    try:
        yield running
    finally:
        running.end()


def peak_rss(pid: int) -> int:
    """The most memory that a process ever had resident, in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
