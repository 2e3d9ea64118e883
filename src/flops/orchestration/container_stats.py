"""What containers of one engine use, as the engine counts it: one request for each, several at a time."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flops.core.errors import ConflictError, NotFoundError
from flops.core.ids import ServiceName
from flops.orchestration.containers import Engine, Names
from flops.orchestration.port import ServiceUsage

_AT_ONCE = 8


def consumed(engine: Engine, names: Names) -> list[ServiceUsage]:
    """What the services of one FLOPS_HOME use on this engine; those of other engines are not known to it.

    Raises:
        UnavailableError: the engine does not answer.
    """
    what = "what services use is not known"
    with engine.asking(what):
        containers = engine.api.containers(filters=names.mine())
    running = {
        str(container["Id"]): ServiceName(container["Labels"]["flops.service"])
        for container in containers
        if container["State"] == "running" and container["Labels"].get("flops.service")
    }

    def look(container: str) -> ServiceUsage | None:
        try:
            with engine.asking(what):
                stats = engine.api.stats(container, stream=False, one_shot=True)
        except (NotFoundError, ConflictError):  # it has ended
            return None
        return _usage_of(running[container], stats)

    if not running:
        return []
    with ThreadPoolExecutor(min(_AT_ONCE, len(running))) as threads:
        found = [usage for usage in threads.map(look, running) if usage is not None]
    return sorted(found, key=lambda usage: usage.name)


def _usage_of(name: ServiceName, stats: Mapping[str, Any]) -> ServiceUsage:
    cpu = (stats.get("cpu_stats") or {}).get("cpu_usage") or {}
    memory = stats.get("memory_stats") or {}
    details = memory.get("stats") or {}
    # As `docker stats` does: what was read from files and can be read again does not count.
    cached = details.get("inactive_file", details.get("total_inactive_file", 0))
    networks = (stats.get("networks") or {}).values()
    total = cpu.get("total_usage")
    used = memory.get("usage")
    return ServiceUsage(
        name,
        cpu_s=None if total is None else total / 1e9,
        memory_bytes=None if used is None else max(0, used - cached),
        threads=(stats.get("pids_stats") or {}).get("current"),
        received_bytes=sum(one["rx_bytes"] for one in networks) if networks else None,
        sent_bytes=sum(one["tx_bytes"] for one in networks) if networks else None,
    )
