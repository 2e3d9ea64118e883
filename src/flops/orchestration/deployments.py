"""What a `docker` orchestrator remembers of a service, and how that is written down (see `service_files`).

Written before the engine is asked for anything. Environments and the content of files are not in it:
containers have them, and a digest tells whether a spec is the same.
"""

import secrets
from dataclasses import dataclass, field, replace
from typing import Any

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
