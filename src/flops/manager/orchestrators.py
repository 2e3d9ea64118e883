"""Which orchestrator a FLOPS_HOME works with: asked for once, remembered, opened by every manager.

A project's services live on after the manager that started them, so the next manager has to look for them in
the same place, whatever the environment says that it is started in.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from flops.core.errors import ConflictError
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.paths import write_private_json
from flops.orchestration import Orchestrator, ProcessOrchestrator

_REMEMBERED = ("orchestrator", "docker_host", "advertise", "registry", "base_image")
PROCESS = "process"


def _always() -> bool:
    return True


def recall(settings: Settings) -> Settings:
    """The settings with what is not asked for as it was last time."""
    last = _read(settings)
    wanted = {name: getattr(settings, name) or last.get(name) for name in _REMEMBERED}
    return replace(settings, **(wanted | {"orchestrator": wanted["orchestrator"] or PROCESS}))


def remember(settings: Settings, unsettled: Sequence[ProjectId]) -> None:
    """Keep the settings for the next manager.

    Args:
        settings: as `recall` gives them.
        unsettled: projects that may have services.
    Raises:
        ConflictError: those are on another orchestrator.
    """
    last, now = _read(settings), {name: getattr(settings, name) for name in _REMEMBERED}
    if now == last:
        return
    if unsettled and any(last.get(name) != now[name] for name in ("orchestrator", "docker_host")) and last:
        was = last.get("orchestrator")
        raise ConflictError(
            f"{len(unsettled)} project{'s' if len(unsettled) > 1 else ''} ({', '.join(unsettled[:5])}) of "
            f"{settings.home} run on {was} - start the manager with FLOPS_ORCHESTRATOR={was} and end them "
            "first, or choose another FLOPS_HOME"
        )
    write_private_json(_file(settings), now)


def open_programs(settings: Settings, may_act: Callable[[], bool] = _always) -> Orchestrator:
    """What runs programs of this machine."""
    return ProcessOrchestrator(settings.services_dir, settings.logs_dir / "services", may_act=may_act)


def open_orchestrator(
    settings: Settings, programs: Orchestrator, may_act: Callable[[], bool] = _always
) -> Orchestrator:
    """What runs projects' services.

    Args:
        programs: runs programs of this machine.
        may_act: whether this manager may, for what orchestrators do by themselves.
    Raises:
        UnavailableError: its engine does not answer.
    """
    if settings.orchestrator == "docker":
        from flops.orchestration.containers import home_id
        from flops.orchestration.docker import DockerOrchestrator

        return DockerOrchestrator(
            settings.containers_dir,
            settings.logs_dir / "containers",
            home=home_id(settings.home),
            url=settings.docker_host,
            advertise=settings.advertise,
            may_act=may_act,
        )
    if settings.orchestrator == "swarm":
        from flops.orchestration.swarm import SwarmOrchestrator

        return SwarmOrchestrator(
            settings.docker_host, settings.home, advertise=settings.advertise, may_act=may_act
        )
    return programs


def _file(settings: Settings) -> Path:
    return settings.home / "orchestrator.json"


def _read(settings: Settings) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(_file(settings).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
