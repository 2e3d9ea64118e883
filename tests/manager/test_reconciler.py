"""The reconciler on a database that goes away and comes back."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flops.core.clock import SystemClock
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.manager import deployment
from flops.manager.cancellation import Places
from flops.manager.databases import open_own_database
from flops.manager.grounds import ProgramGround
from flops.manager.inference import Inference
from flops.manager.lifecycle import Surroundings
from flops.manager.paths import data_token_file, read_or_make_token
from flops.manager.ports import Ports
from flops.manager.reconciler import Reconciler
from flops.manager.states import State
from flops.manager.store import Store
from flops.manager.tracker import Tracker
from flops.orchestration import FakeOrchestrator
from flops.persistence import DatabaseAwayError
from flops.tracking import Spool
from tests.postgres import postgres_installed, postgres_server

if TYPE_CHECKING:
    from tests.manager.conftest import MarkingSteps

PROJECT = ProjectId("p-7k2mqd")
SPEC = spec_from_mapping({"repo": "/somewhere/mnist", "training": {"rounds": 2, "learners": 2}})
LIMIT_S = 60.0


def test_a_project_outlives_its_database(
    tmp_path: Path, marking_steps: "type[MarkingSteps]", require: Callable[[bool, str], None]
) -> None:
    require(postgres_installed(), "PostgreSQL 15")
    with postgres_server() as server:
        settings = Settings(home=tmp_path, database_url=server.database())
        settings.run_dir.mkdir()
        store = Store(open_own_database(settings))
        killed = threading.Event()

        def kill_once() -> None:
            # The third step has had its effect, and cannot be noted.
            if len(steps.effects) == 3 and not killed.is_set():
                server.kill()
                killed.set()

        steps = marking_steps(tmp_path, kill_once)
        reconciler = _reconciler(settings, store, steps)
        deployment.write_spec(settings, PROJECT, SPEC)
        store.create_project(PROJECT, name="mnist", spec=SPEC.to_json(), source="/r", rounds_total=2)
        reconciler.start()
        assert killed.wait(LIMIT_S)
        time.sleep(1.0)
        server.start()
        deadline = time.monotonic() + LIMIT_S
        while _state(store) is not State.TRAINING and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _state(store) is State.TRAINING
        reconciler.close()
        store.close()


def _state(store: Store) -> State | None:
    try:
        return store.project(PROJECT).state
    except DatabaseAwayError:
        return None


def _reconciler(settings: Settings, store: Store, steps: "MarkingSteps") -> Reconciler:
    clock, orchestrator = SystemClock(), FakeOrchestrator()
    ground = ProgramGround(settings, Ports(settings.home / "ports.json"), store)

    def support() -> None:
        read_or_make_token(data_token_file(settings))

    return Reconciler(
        Surroundings(
            settings=settings,
            store=store,
            orchestrator=orchestrator,
            tracker=Tracker(Spool(settings.spool_dir), store),
            clock=clock,
            step_runner=lambda project: steps,
            places=Places(1),
            ground=ground,
            inference=Inference(store, orchestrator, ground, clock),
            support=support,
        )
    )
