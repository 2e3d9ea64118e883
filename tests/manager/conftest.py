"""A store on a real database, and steps that leave a mark instead of doing work."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flops.core.clock import ManualClock
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.cancellation import Cancellation
from flops.manager.step_process import Progress
from flops.manager.store import Store
from flops.persistence import open_database

PROJECT = ProjectId("p-7k2mqd")


class MarkingSteps:
    """Runs every step by noting it; what a real step would find there already, it does not do again.

    Args:
        folder: where the "checkout" and the "export" lie.
        after_effect: called when a step's effect is there and its result is not yet known to anybody.
    """

    def __init__(self, folder: Path, after_effect: Callable[[], None] = lambda: None) -> None:
        self.effects: list[str] = []
        self.failing: dict[str, Exception] = {}
        self._folder = folder
        self._after_effect = after_effect
        self._lock = threading.Lock()

    def run(
        self, step: str, request: Mapping[str, Any], progress: Progress, cancellation: Cancellation
    ) -> dict[str, Any]:
        cancellation.check()
        if step in self.failing:
            raise self.failing[step]
        with self._lock:
            if step not in self.effects:
                self.effects.append(step)
        self._after_effect()
        return self._results()[step]

    def close(self) -> None:
        pass

    def _results(self) -> dict[str, dict[str, Any]]:
        python = str(self._folder / "python")
        return {
            "fetch": {"path": str(self._folder), "commit": "c0ffee", "warnings": ["a dirty tree"]},
            "check-contract": {"kind": "flops", "warnings": []},
            "lock": {"hash": "1" * 32, "python": "3.11.2", "warnings": []},
            "environment": {"python": python, "hash": "1" * 32, "created": True},
            "initial-model": {"path": "initial.safetensors", "flavor": "sklearn"},
            "data": {
                "tags": ["digits"],
                "sites": [{"site": "a", "num_examples": 10}, {"site": "b", "num_examples": 20}],
            },
            "export-environment": {"python": python, "hash": "2" * 32, "created": True},
            "export": {"directory": str(self._folder / "export"), "flavor": "sklearn"},
        }


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path / "home")
    settings.run_dir.mkdir(parents=True, mode=0o700)
    return settings


@pytest.fixture
def settings_on_each_engine(database: Path | str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, database_url=database if isinstance(database, str) else None)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(settings: Settings, clock: ManualClock) -> Iterator[Store]:
    store = Store(open_database(settings.database_url or settings.database), clock)
    yield store
    store.close()


@pytest.fixture
def project(store: Store) -> ProjectId:
    store.create_project(PROJECT, name="mnist", spec={"repo": "/r"}, source="/r", rounds_total=3)
    return PROJECT


@pytest.fixture
def marking_steps() -> type[MarkingSteps]:
    return MarkingSteps
