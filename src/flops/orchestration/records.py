"""What a `process` orchestrator knows of a service, and how that is written down (see `service_files`)."""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flops.orchestration.linux import Identity
from flops.orchestration.port import (
    LIVE_STATES,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
    loopback_address,
)

_FORMAT = 1


@dataclass
class Record:
    """One service: its spec, its last known state, and the process behind it.

    Args:
        stopping: its end was asked for; written before the first signal, so that no crash brings it
        back. quick_ends: attempts in a row that ended soon after their start.
    """

    spec: ServiceSpec
    state: ServiceState = "pending"
    exit_code: int | None = None
    reason: str = ""
    restarts: int = 0
    started_at: float | None = None
    process: Identity | None = None
    stopping: bool = False
    quick_ends: int = 0

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            name=self.spec.name,
            state=self.state,
            exit_code=self.exit_code,
            reason=self.reason,
            restarts=self.restarts,
            started_at=self.started_at,
            pid=self.process.pid if self.process is not None and self.state == "running" else None,
            role=self.spec.role,
            project=self.spec.project,
            node=platform.node(),
            endpoint=loopback_address(self.spec) if self.spec.publish and self.live else None,
        )

    def to_json(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "format": _FORMAT,
            "spec": {
                "name": spec.name,
                "command": list(spec.command),
                "role": spec.role,
                "project": spec.project,
                "environment": dict(spec.environment),
                "directory": None if spec.directory is None else str(spec.directory),
                "restart": spec.restart,
                "max_restarts": spec.max_restarts,
                "nice": spec.nice,
                "port": spec.port,
                "publish": spec.publish,
            },
            "state": self.state,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "restarts": self.restarts,
            "started_at": self.started_at,
            "process": None if self.process is None else asdict(self.process),
            "stopping": self.stopping,
            "quick_ends": self.quick_ends,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Record":
        if value["format"] != _FORMAT:
            raise ValueError(f"format {value['format']} instead of {_FORMAT}")
        spec = dict(value["spec"])
        directory = spec.pop("directory")
        command = tuple(spec.pop("command"))
        process = value["process"]
        return cls(
            spec=ServiceSpec(
                command=command, directory=None if directory is None else Path(directory), **spec
            ),
            state=value["state"],
            exit_code=value["exit_code"],
            reason=value["reason"],
            restarts=value["restarts"],
            started_at=value["started_at"],
            process=None if process is None else Identity(**process),
            stopping=value["stopping"],
            quick_ends=value.get("quick_ends", 0),  # records of earlier versions have none
        )
