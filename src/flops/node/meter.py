"""What learners use on this machine, as their manager is told now and then."""

import threading
from collections.abc import Mapping
from typing import Any

from flops.core.clock import Clock, SystemClock
from flops.core.errors import FlopsError
from flops.core.ids import ServiceName
from flops.orchestration import Orchestrator, ServiceUsage, rate

_SHORTEST_S = 1.0
"""Between two looks: each is one pass over all processes."""


class Meter:
    """Looks at the services of this machine. Safe from any thread."""

    def __init__(self, orchestrator: Orchestrator, clock: Clock | None = None) -> None:
        self._orchestrator = orchestrator
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._counted: Mapping[ServiceName, ServiceUsage] = {}
        self._at: float | None = None
        self._used: dict[ServiceName, dict[str, Any]] = {}

    def look(self) -> Mapping[ServiceName, dict[str, Any]]:
        """By service: ``cpu_percent`` since the look before (None at the first one), ``memory_bytes`` and
        ``threads`` now.
        """
        with self._lock:
            now = self._clock.monotonic()
            if self._at is not None and now - self._at < _SHORTEST_S:
                return self._used
            try:
                counted = {one.name: one for one in self._orchestrator.usage()}
            except FlopsError:
                counted = {}
            taken_s = now - self._at if self._at is not None else 0.0
            self._used = {
                name: {
                    "cpu_percent": _percent(self._counted.get(name), one, taken_s),
                    "memory_bytes": one.memory_bytes,
                    "threads": one.threads,
                }
                for name, one in counted.items()
            }
            self._counted, self._at = counted, now
            return self._used


def _percent(before: ServiceUsage | None, now: ServiceUsage, taken_s: float) -> float | None:
    """None: there was no look before, or the service began anew in between."""
    cpu = rate(before.cpu_s, now.cpu_s, taken_s) if before is not None else None
    return None if cpu is None else round(100 * cpu, 1)
