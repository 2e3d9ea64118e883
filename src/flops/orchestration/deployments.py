"""What a `docker` orchestrator remembers of its services: one JSON file each, for the next manager too.

Written before the engine is asked for anything, atomically by rename and not fsynced. Environments and the
content of files are not in it: containers have them, and a digest tells whether a spec is the same.
"""

import json
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flops.core.errors import FlopsError
from flops.core.ids import ServiceName
from flops.orchestration.containers import fingerprint
from flops.orchestration.port import LIVE_STATES, ServiceSpec, ServiceState, ServiceStatus

_FORMAT = 1
_KEPT = ("name", "role", "project", "restart", "max_restarts", "memory_mb", "port", "publish")


def _new_key() -> str:
    return secrets.token_hex(4)


@dataclass
class Deployment:
    """One deployment of a service, and its last known state.

    Args:
        spec: without its environment and files.
        digest: `fingerprint` of the whole spec.
        key: tells its container and files from those of other deployments of the service.
        container: id; None before there is one.
        ending: how the last attempt ended, in words.
        stopping: its end was asked for; written before the first signal, so that no crash brings it back.
        quick_ends: attempts in a row that ended soon after their start.
    """

    spec: ServiceSpec
    digest: str
    key: str = field(default_factory=_new_key)
    state: ServiceState = "pending"
    container: str | None = None
    exit_code: int | None = None
    reason: str = ""
    ending: str = ""
    restarts: int = 0
    started_at: float | None = None
    pid: int | None = None
    node: str = ""
    endpoint: str | None = None
    stopping: bool = False
    quick_ends: int = 0

    @classmethod
    def of(cls, spec: ServiceSpec) -> "Deployment":
        return cls(replace(spec, environment={}, files=()), fingerprint(spec))

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    def status(self) -> ServiceStatus:
        running = self.state == "running"
        return ServiceStatus(
            name=self.spec.name,
            state=self.state,
            exit_code=self.exit_code,
            reason=self.reason,
            restarts=self.restarts,
            started_at=self.started_at,
            pid=self.pid if running else None,
            role=self.spec.role,
            project=self.spec.project,
            node=self.node,
            endpoint=self.endpoint if running else None,
        )

    def to_json(self) -> dict[str, Any]:
        value = {name: item for name, item in vars(self).items() if name != "spec"}
        spec = {name: getattr(self.spec, name) for name in _KEPT}
        return {
            "format": _FORMAT,
            "spec": spec | {"command": list(self.spec.command), "image": self.spec.image},
            **value,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Deployment":
        value = dict(value)
        if (number := value.pop("format")) != _FORMAT:
            raise ValueError(f"format {number} instead of {_FORMAT}")
        spec = dict(value.pop("spec"))
        return cls(spec=ServiceSpec(command=tuple(spec.pop("command")), **spec), **value)


class Deployments:
    """The files of all services, in a folder of mode 700."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._folder = folder

    def _path(self, name: ServiceName) -> Path:
        return self._folder / f"{name}.json"

    def save(self, deployment: Deployment) -> None:
        path = self._path(deployment.spec.name)
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(deployment.to_json(), file)
        temporary.replace(path)

    def delete(self, name: ServiceName) -> None:
        self._path(name).unlink(missing_ok=True)

    def load(self) -> tuple[list[Deployment], list[tuple[Path, str]]]:
        """All of them, and the unreadable files with the reason; those are renamed to ``*.broken``."""
        deployments: list[Deployment] = []
        broken: list[tuple[Path, str]] = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                deployment = Deployment.from_json(json.loads(path.read_bytes()))
                if self._path(deployment.spec.name) != path:
                    raise ValueError(f"it describes service {deployment.spec.name}")
            except (ValueError, KeyError, TypeError, AttributeError, FlopsError) as error:
                aside = path.with_suffix(".broken")
                path.replace(aside)
                broken.append((aside, f"{type(error).__name__}: {error}"))
            else:
                deployments.append(deployment)
        return deployments, broken
