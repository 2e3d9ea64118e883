"""What of a preparation runs side by side, and what becomes of it when something goes wrong."""

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import FailedError
from flops.core.events import EventKind
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.manager import deployment
from flops.manager.cancellation import Cancellation, Cancelled, Places
from flops.manager.preparing import Preparing
from flops.manager.states import Observation, State, preparing_steps
from flops.manager.step_process import Progress
from flops.manager.store import Store
from flops.orchestration import FakeOrchestrator
from flops.persistence import open_database

PROJECT = ProjectId("p-7k2mqd")
SPEC = spec_from_mapping({"repo": "/somewhere/mnist", "data": {"mock": "mnist"}})
LIMIT_S = 10.0


class ImageOrchestrator(FakeOrchestrator):
    """One whose services are images, as far as a preparation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[str] = []

    @property
    def runs_images(self) -> bool:
        return True

    def expect(self, image: str) -> None:
        self.expected.append(image)


class Steps:
    """Steps that end when they may, and note who ran beside them."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.beside: dict[str, set[str]] = {}
        self.hold: dict[str, Callable[[], bool]] = {}
        """A step goes on once this is true."""
        self.failing: set[str] = set()
        self.results: dict[str, dict[str, Any]] = {
            "images": {"learner": "flops-learner:1"},
            "data": {"tags": ["mnist"], "sites": [{"site": "a", "num_examples": 1}]},
        }
        self.changed = threading.Condition()

    def run(
        self, step: str, request: Mapping[str, Any], progress: Progress, cancellation: Cancellation
    ) -> dict[str, Any]:
        with self.changed, cancellation.calling(self._wake):
            self.running.add(step)
            for other in self.running:
                self.beside.setdefault(other, set()).update(self.running - {other})
            self.changed.notify_all()
            may = self.hold.get(step, lambda: True)
            assert self.changed.wait_for(lambda: may() or cancellation.is_set, LIMIT_S), f"{step} hangs"
            self.running.discard(step)
            self.changed.notify_all()
        cancellation.check()
        if step in self.failing:
            raise FailedError(f"{step} went wrong")
        return self.results.get(step, {})

    def close(self) -> None:
        pass

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()


class World:
    def __init__(self, settings: Settings, store: Store) -> None:
        self.store = store
        self.steps = Steps()
        self.orchestrator = ImageOrchestrator()
        self.cancellation = Cancellation()
        self.woken = threading.Event()
        self.preparing = Preparing(
            settings,
            store,
            PROJECT,
            self.cancellation,
            Places(3),
            lambda project: self.steps,
            lambda: None,
            lambda step, project: {},
            self.orchestrator,
            self.woken.set,
        )

    def advance(self) -> None:
        """To the end of the preparation."""
        while True:
            self.woken.clear()
            match self.preparing.advance(self.store.project(PROJECT)):
                case None:
                    return
                case False:
                    assert self.woken.wait(LIMIT_S)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    store = Store(open_database(settings.database), ManualClock())
    deployment.write_spec(settings, PROJECT, SPEC)
    store.create_project(PROJECT, name="mnist", spec=SPEC.to_json(), source=SPEC.repo, rounds_total=2)
    store.observe(PROJECT, Observation(begun=True))
    made = World(settings, store)
    yield made
    made.preparing.close()
    store.close()


def test_images_are_built_beside_the_environment_and_the_check_of_the_code(world: World) -> None:
    steps = world.steps
    # Neither could end before the other began, were they run one after the other.
    steps.hold["images"] = lambda: "initial-model" in steps.beside["images"]
    steps.hold["initial-model"] = lambda: "images" in steps.beside["initial-model"]
    steps.hold["lock"] = lambda: "dataset" in steps.beside["lock"]
    steps.hold["dataset"] = lambda: "lock" in steps.beside["dataset"]
    world.advance()
    assert steps.beside["images"] >= {"initial-model"}
    assert steps.beside["lock"] == {"dataset"}
    assert steps.beside["aggregator-image"] <= {"data"}
    done = world.store.steps(PROJECT)
    assert done.keys() == preparing_steps("classic", mock=True, images=True).keys()
    assert world.orchestrator.expected == ["flops-learner:1"]


def test_every_step_comes_after_what_it_needs() -> None:
    for mode in ("classic", "hierarchical"):
        for mock in (False, True):
            for images in (False, True):
                steps = preparing_steps(mode, mock=mock, images=images)
                done: set[str] = set()
                while ready := {step for step in steps.keys() - done if steps[step] <= done}:
                    done |= ready
                assert done == steps.keys()
                assert ("dataset" in steps, "images" in steps) == (mock, images)


def test_a_branch_that_fails_fails_the_preparation(world: World) -> None:
    world.steps.failing.add("images")
    with pytest.raises(FailedError, match="images went wrong"):
        world.advance()
    assert "aggregator-image" not in world.steps.beside


def test_a_failure_gives_up_what_runs_beside_it(world: World) -> None:
    steps = world.steps
    steps.hold["images"] = lambda: False
    steps.hold["environment"] = lambda: "images" in steps.beside["environment"]
    steps.failing.add("environment")
    with pytest.raises(FailedError, match="environment went wrong"):
        world.advance()
    assert steps.running == {"images"}
    world.preparing.close()
    assert steps.running == set()
    assert "images" not in world.store.steps(PROJECT)
    steps.hold.clear()
    steps.failing.clear()
    world.advance()  # as after an image registry that was away
    assert "aggregator-image" in world.store.steps(PROJECT)


def test_a_pause_gives_up_all_branches_and_they_are_run_again(world: World) -> None:
    steps = world.steps
    steps.hold["images"] = steps.hold["environment"] = lambda: False
    pausing = threading.Thread(target=_pause_when_both_run, args=(world,))
    pausing.start()
    with pytest.raises(Cancelled):
        world.advance()
    pausing.join(LIMIT_S)
    world.preparing.close()
    assert steps.running == set()
    assert world.store.project(PROJECT).state is State.PAUSING
    events = [
        event.data["step"] for event in world.store.events(PROJECT) if event.kind is EventKind.STEP_FINISHED
    ]
    # The data set, which nobody waits for yet, may have been given up as well.
    assert set(events) - {"dataset"} == {"check-contract", "fetch", "lock"}


def _pause_when_both_run(world: World) -> None:
    steps = world.steps
    with steps.changed:
        assert steps.changed.wait_for(lambda: steps.running >= {"images", "environment"}, LIMIT_S)
    world.store.observe(PROJECT, Observation(pause_requested=True))
    world.cancellation.cancel()
