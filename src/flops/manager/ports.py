"""TCP ports of services that share the network of their node: one for each in all of a FLOPS_HOME."""

import json
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flops.core.errors import FailedError
from flops.manager.paths import write_private_json

_PORTS = range(21_000, 29_000)


def is_free(port: int) -> bool:
    """Whether a program of this machine can listen there, on loopback, now."""
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


class Ports:
    """Which service has which port, kept in a file. One for each FLOPS_HOME; safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def of(self, service: str, is_free: Callable[[int], bool] = lambda port: True) -> int:
        """The port of a service: the same one each time.

        Args:
            is_free: whether nobody else has it, as far as is known; asked before it is chosen.
        """
        with self._lock:
            taken = self._read()
            if service not in taken:
                free = set(_PORTS) - set(taken.values())
                if not free:
                    raise FailedError(
                        f"no port is left for service {service} - remove projects with 'flops rm'"
                    )
                # At random, so that two managers on the same nodes seldom choose the same.
                shuffled = random.sample(sorted(free), len(free))
                taken[service] = next(filter(is_free, shuffled), shuffled[0])
                write_private_json(self._path, taken)
            return taken[service]

    def release(self, project: str) -> None:
        """The ports of a project's services are free again."""
        with self._lock:
            taken = self._read()
            kept = {name: port for name, port in taken.items() if not name.startswith(f"{project}-")}
            if kept != taken:
                write_private_json(self._path, kept)

    def _read(self) -> dict[str, int]:
        try:
            content: dict[str, int] = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content
