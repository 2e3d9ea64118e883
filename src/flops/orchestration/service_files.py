"""What an orchestrator remembers of its services: one JSON file each, for the next manager too.

Writes are atomic by rename and not fsynced: they need to survive the end of the manager, not of the machine
(a file torn by a power cut is set aside at the next start).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flops.core.errors import FlopsError
from flops.core.ids import ServiceName
from flops.orchestration.port import ServiceSpec


class Remembered(Protocol):
    """What is kept of one service."""

    @property
    def spec(self) -> ServiceSpec: ...

    def to_json(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Remembered)


class ServiceFiles(Generic[T]):
    """The files of all services, in a folder of mode 700 (environments may hold secrets).

    Args:
        from_json: reads what ``to_json`` wrote; raises where it cannot.
    """

    def __init__(self, folder: Path, from_json: Callable[[dict[str, Any]], T]) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        self._folder = folder
        self._from_json = from_json

    def _path(self, name: ServiceName) -> Path:
        return self._folder / f"{name}.json"

    def save(self, service: T) -> None:
        path = self._path(service.spec.name)
        temporary = path.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(service.to_json(), file)
        temporary.replace(path)

    def delete(self, name: ServiceName) -> None:
        self._path(name).unlink(missing_ok=True)

    def load(self) -> tuple[list[T], list[tuple[Path, str]]]:
        """All services, and the unreadable files with the reason; those are renamed to ``*.broken``."""
        services: list[T] = []
        broken: list[tuple[Path, str]] = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                service = self._from_json(json.loads(path.read_bytes()))
                if self._path(service.spec.name) != path:
                    raise ValueError(f"it describes service {service.spec.name}")
            except (ValueError, KeyError, TypeError, AttributeError, FlopsError) as error:
                aside = path.with_suffix(".broken")
                path.replace(aside)
                broken.append((aside, f"{type(error).__name__}: {error}"))
            else:
                services.append(service)
        return services, broken
