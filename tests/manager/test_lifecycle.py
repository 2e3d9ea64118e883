"""One project's way: real store and spool, the shipped fake orchestrator, steps that only leave marks."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, FailedError
from flops.core.events import EventKind
from flops.core.ids import ProjectId, ServiceName
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.federation import AggregatorConfig
from flops.manager import deployment
from flops.manager.cancellation import Cancellation, Cancelled, Places
from flops.manager.databases import open_own_database
from flops.manager.grounds import ProgramGround
from flops.manager.inference import Inference
from flops.manager.lifecycle import Lifecycle, Surroundings
from flops.manager.paths import ProjectPaths, data_token_file, read_or_make_token
from flops.manager.ports import Ports
from flops.manager.reports import Report
from flops.manager.rows import Service
from flops.manager.states import Observation, State
from flops.manager.store import Store, Superseded
from flops.manager.tracker import Tracker
from flops.orchestration import FakeOrchestrator, ServiceSpec
from flops.tracking import KeptArtifact, ModelExported, RegisteredModel, Result, RunEnded, Spool
from flops.tracking.results import write_result

if TYPE_CHECKING:
    from tests.manager.conftest import MarkingSteps

PROJECT = ProjectId("p-7k2mqd")
AGGREGATOR = ServiceName(f"{PROJECT}-aggregator")
AGENT = ServiceName(f"{PROJECT}-agent-1")
SPEC = spec_from_mapping({"repo": "/somewhere/mnist", "training": {"rounds": 2, "learners": 2}})


class Killed(BaseException):
    """kill -9 of the manager, as near as one process can come to it."""


class Fuse:
    """Blows at the n-th place where the manager may die; places are passed by the main thread only."""

    def __init__(self, places: int | None) -> None:
        self.left = places

    def __call__(self, *_: object) -> None:
        if self.left is None or threading.current_thread() is not threading.main_thread():
            return
        self.left -= 1
        if self.left == 0:
            self.left = None
            raise Killed


class CountingOrchestrator(FakeOrchestrator):
    """Counts real starts, and lets the manager die right behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: Counter[str] = Counter()
        self.after_effect: Callable[[], None] = lambda: None

    def deploy(self, spec: ServiceSpec) -> None:
        live = any(status.name == spec.name and status.live for status in self.list())
        super().deploy(spec)
        if not live:
            self.starts[spec.name] += 1
        self.after_effect()


class World:
    """What outlives a manager (disk, services), and one manager's part of one project in it."""

    def __init__(
        self, folder: Path, steps: "type[MarkingSteps]", fuse: Fuse, database_url: str | None
    ) -> None:
        folder.mkdir()
        self.settings = Settings(home=folder, database_url=database_url)
        self.settings.run_dir.mkdir()
        (folder / "model.safetensors").write_bytes(b"parameters")
        (folder / "export").mkdir()
        (folder / "export" / "MLmodel").write_text("flavors: {}")
        self.folder = folder
        self.fuse = fuse
        self.orchestrator = CountingOrchestrator()
        self.orchestrator.after_effect = fuse
        self.steps = steps(folder, fuse)
        self.spool = Spool(self.settings.spool_dir)
        self.woken = threading.Event()
        self._start()
        deployment.write_spec(self.settings, PROJECT, SPEC)
        self.store.on_change = lambda project: None
        self.store.create_project(
            PROJECT, name="mnist", spec=SPEC.to_json(), source=SPEC.repo, rounds_total=2
        )
        self.store.on_change = fuse

    def _start(self) -> None:
        clock = self.clock = ManualClock()
        self.store = Store(open_own_database(self.settings), clock, self.fuse)
        self.tracker = Tracker(self.spool, self.store)
        self.cancellation = Cancellation()
        self.ground = ProgramGround(self.settings, Ports(self.settings.home / "ports.json"), self.store)
        self.lifecycle = Lifecycle(
            Surroundings(
                settings=self.settings,
                store=self.store,
                orchestrator=self.orchestrator,
                tracker=self.tracker,
                clock=clock,
                step_runner=lambda project: self.steps,
                places=Places(1),
                ground=self.ground,
                inference=Inference(self.store, self.orchestrator, self.ground, clock),
                support=self._support,
            ),
            PROJECT,
            self.cancellation,
            lambda delay_s: self.woken.set(),
        )

    def _support(self) -> None:
        read_or_make_token(data_token_file(self.settings))

    def kill_and_start_again(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self.lifecycle.close()
        self.store.close()

    def advance(self) -> None:
        """As far as it goes by itself."""
        while self._once():
            pass

    def _once(self) -> bool:
        self.woken.clear()
        try:
            return self.lifecycle.advance()
        except (Superseded, Cancelled):
            return True

    def state(self) -> State:
        return self.store.project(PROJECT).state

    def train(self, rounds: int = 2) -> None:
        """What aggregator and agents do, told as often as it is asked for."""
        metrics = {"loss": 0.25, "accuracy": 0.9}
        reports = [Report(1, 10.0, EventKind.LEARNER_CONNECTED, {"learner": "learner-1"})]
        for number in range(1, rounds + 1):
            seq = len(reports) + 1
            reports.append(
                Report(seq, 9.0 + seq, EventKind.ROUND_FINISHED, {"round": number, "metrics": metrics})
            )
            if number % 2 == 0:  # a training of two rounds, or one that was extended by two
                end = {
                    "rounds": number,
                    "best_round": number,
                    "model_file": str(self.folder / "model.safetensors"),
                    "metrics": metrics,
                }
                reports.append(Report(seq + 1, 10.0 + seq, EventKind.TRAINING_FINISHED, end))
        self.store.accept_reports(PROJECT, "aggregator", reports)
        for status in self.orchestrator.list(PROJECT):
            if status.live:
                self.orchestrator.exit(status.name, 0)

    def register(self) -> None:
        """What the recorder does."""
        records = [entry.record for entry in self.spool.read(PROJECT)]
        exported = [record for record in records if isinstance(record, ModelExported)]
        if not exported:
            kept = KeptArtifact(uri="runs:/r/parameters.safetensors", round=2, rounds=2)
            write_result(self.spool.result_file(PROJECT), Result(project=PROJECT, artifact=kept))
            return
        rounds = exported[-1].rounds
        version = len({record.rounds for record in exported})
        model = RegisteredModel(
            name="mnist",
            version=version,
            uri=f"models:/mnist/{version}",
            model_id=f"m-{version}",
            round=exported[-1].round,
            rounds=rounds,
            path=str(self.folder),
        )
        result = Result(project=PROJECT, run_id="r", experiment_id="1", model=model)
        write_result(self.spool.result_file(PROJECT), result)

    def play(self) -> None:
        """From wherever it is to the end."""
        self.advance()
        if self.state() is State.TRAINING:
            self.train(self.store.project(PROJECT).rounds_total)
            self.advance()
        while self.state() is State.PACKAGING and "export" not in self.store.steps(PROJECT):
            assert self.woken.wait(10) or "export-environment" in self.store.steps(PROJECT)
            self.advance()
        if self.state() is State.PACKAGING:
            self.register()
            self.advance()

    def history(self) -> list[tuple[str, str]]:
        """Events without those of the step that runs beside the others, whose place differs."""
        return [
            (str(event.kind), str(event.data.get("state") or event.data.get("step")))
            for event in self.store.events(PROJECT)
            if event.data.get("step") != "export-environment"
        ]


@pytest.fixture
def make_world(tmp_path: Path, marking_steps: "type[MarkingSteps]") -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(fuse: Fuse | None = None, database_url: str | None = None) -> World:
        folder = tmp_path / f"{len(worlds)}"
        worlds.append(World(folder, marking_steps, fuse or Fuse(None), database_url))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def test_a_project_goes_from_its_repository_to_a_registered_model(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.play()
    assert [state for kind, state in world.history() if kind == "project.state"] == list(State)[:6]
    assert [step for kind, step in world.history() if kind == "step.finished"] == [
        "fetch",
        "check-contract",
        "lock",
        "environment",
        "initial-model",
        "data",
        "export",
        "register",
    ]
    assert [model.uri for model in world.store.models(PROJECT)] == ["models:/mnist/1"]
    assert not any(status.live for status in world.orchestrator.list())
    assert world.store.project(PROJECT).cleaned


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_manager_is_killed_after_every_step_and_ends_the_same(
    make_world: Callable[..., World], request: pytest.FixtureRequest, database: str
) -> None:
    server = request.getfixturevalue("postgres") if database == "postgresql" else None
    expected = make_world()
    expected.play()
    for place in range(1, 200):
        world = make_world(Fuse(place), server.database() if server else None)
        try:
            world.play()
        except Killed:
            world.kill_and_start_again()
            world.play()
        else:
            break
        assert world.history() == expected.history(), f"killed at place {place}"
        assert world.state() is State.FINISHED
        assert set(world.orchestrator.starts.values()) == {1}, f"killed at place {place}"
        assert sorted(world.steps.effects) == sorted(expected.steps.effects)
        assert _tracked(world) == _tracked(expected)
        world.close()
    assert place > 30, "the manager was hardly ever killed"


def _tracked(world: World) -> list[Any]:
    """Records without repetitions: the recorder promises that twice is once."""
    records = [entry.record for entry in world.spool.read(PROJECT)]
    return sorted({repr(record).replace(str(world.folder), "") for record in records})


def test_configuration_files_and_tokens_are_private_and_stay_the_same(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.advance()
    config = ProjectPaths.of(world.settings, PROJECT).config
    before = {path.name: path.read_text() for path in config.iterdir()}
    assert set(before) == {
        "spec.json",
        "tokens.json",
        "aggregator.json",
        "learner-1.json",
        "learner-2.json",
    }
    assert config.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in config.iterdir()} == {0o600}
    learners, results = world.store.learners(PROJECT), world.store.steps(PROJECT)
    deployment.write_configurations(
        world.settings,
        world.ground,
        PROJECT,
        SPEC,
        learners,
        results,
        rounds=2,
        numbers={},
    )
    assert {path.name: path.read_text() for path in config.iterdir()} == before
    database = world.settings.database.read_bytes()
    for secret in (before["tokens.json"].split('"')[3], world.settings.home.name.zfill(40)):
        assert secret.encode() not in database


def test_a_failed_step_fails_the_project_with_its_reason(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.steps.failing["lock"] = FailedError("numpy and scipy clash")
    with pytest.raises(FailedError, match="numpy and scipy clash"):
        world.advance()
    assert world.steps.effects == ["fetch", "check-contract"]


def test_a_stop_while_training_leaves_no_service(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.advance()
    assert world.state() is State.TRAINING
    world.store.observe(PROJECT, Observation(stop_requested=True), "stop was requested")
    world.cancellation.cancel()
    world.advance()
    assert world.state() is State.STOPPED
    assert [status.reason for status in world.orchestrator.list(PROJECT)] == ["stopped"] * 3


def test_a_paused_training_goes_on_with_all_its_services(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.advance()
    world.store.accept_reports(
        PROJECT, "aggregator", [Report(1, 1.0, EventKind.LEARNER_CONNECTED, {"learner": "learner-1"})]
    )
    world.store.end_service(PROJECT, AGENT, "learner-1 ended (exit code 1)", warn=True)
    world.store.observe(PROJECT, Observation(pause_requested=True), "pause was requested")
    world.cancellation.cancel()
    world.advance()
    assert world.state() is State.PAUSED
    assert not any(status.live for status in world.orchestrator.list(PROJECT))
    assert world.store.unsettled() == []
    world.store.observe(PROJECT, Observation(resume_requested=True), "resume was requested")
    assert world.store.unsettled() == [PROJECT]
    world.kill_and_start_again()
    world.advance()
    assert world.state() is State.TRAINING
    assert set(world.orchestrator.starts.values()) == {2}
    assert [learner.state for learner in world.store.learners(PROJECT)] == ["waiting", "waiting"]
    assert [service.over for service in world.store.services(PROJECT)] == [None] * 3


def test_a_pause_while_preparing_gives_up_the_step_and_does_it_again(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    while world.store.steps(PROJECT).keys() != {"fetch", "check-contract"}:
        world.lifecycle.advance()
    world.store.observe(PROJECT, Observation(pause_requested=True), "pause was requested")
    world.cancellation.cancel()
    world.advance()
    assert world.state() is State.PAUSED
    world.kill_and_start_again()
    world.advance()
    assert world.state() is State.PAUSED
    world.store.observe(PROJECT, Observation(resume_requested=True), "resume was requested")
    world.kill_and_start_again()
    world.play()
    assert world.state() is State.FINISHED
    assert [step for kind, step in world.history() if kind == "step.finished"][:3] == [
        "fetch",
        "check-contract",
        "lock",
    ]


def test_a_training_that_ended_while_it_was_being_paused_needs_no_service_again(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.advance()
    world.store.observe(PROJECT, Observation(pause_requested=True), "pause was requested")
    world.train()
    world.advance()
    world.store.observe(PROJECT, Observation(resume_requested=True), "resume was requested")
    world.kill_and_start_again()
    world.play()
    assert world.state() is State.FINISHED
    assert set(world.orchestrator.starts.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("place", [None, *range(1, 40)])
def test_an_extended_project_trains_on_and_registers_its_next_version(
    make_world: Callable[..., World], place: int | None
) -> None:
    fuse = Fuse(None)
    world = make_world(fuse)
    world.play()
    world.store.on_change = lambda project: None
    assert world.store.extend(PROJECT, 2) is State.SUBMITTED
    fuse.left = place
    world.kill_and_start_again()
    try:
        world.play()
    except Killed:
        world.kill_and_start_again()
        world.play()
    project = world.store.project(PROJECT)
    assert (project.state, project.rounds_done, project.rounds_total) == (State.FINISHED, 4, 4)
    assert (project.best_round, project.cleaned) == (4, True)
    assert sorted(model.uri for model in world.store.models(PROJECT)) == [
        "models:/mnist/1",
        "models:/mnist/2",
    ]
    records = [entry.record for entry in world.spool.read(PROJECT)]
    exported = [record for record in records if isinstance(record, ModelExported)]
    assert {(record.rounds, record.tags.get("flops.previous")) for record in exported} >= {
        (2, None),
        (4, "mnist/1"),
    }
    assert isinstance(records[-1], RunEnded)
    states = [state for kind, state in world.history() if kind == "project.state"]
    assert states == 2 * list(State)[:6]
    assert set(world.orchestrator.starts.values()) == {2}


def test_a_paused_project_that_is_extended_stays_paused_and_trains_all_when_it_goes_on(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.advance()
    world.store.observe(PROJECT, Observation(pause_requested=True), "pause was requested")
    world.train()  # its last words
    world.advance()
    assert world.store.extend(PROJECT, 2) is State.PAUSED
    world.store.observe(PROJECT, Observation(resume_requested=True), "resume was requested")
    world.kill_and_start_again()
    world.advance()
    assert world.state() is State.TRAINING
    config = AggregatorConfig.read(ProjectPaths.of(world.settings, PROJECT).config / "aggregator.json")
    assert config.plan.rounds == 4
    world.play()
    assert (world.state(), world.store.project(PROJECT).rounds_done) == (State.FINISHED, 4)


def test_a_project_that_trains_cannot_be_extended(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.advance()
    with pytest.raises(ConflictError, match=f"project {PROJECT} is training"):
        world.store.extend(PROJECT, 2)


def test_an_aggregator_that_dies_is_started_again_and_then_given_up(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.advance()
    world.orchestrator.write_log(AGGREGATOR, "Traceback\nMemoryError\n")
    for number in range(1, 4):
        world.orchestrator.exit(AGGREGATOR, 1)
        world.advance()
        world.clock.advance(60)  # the rest before the next attempt
        world.advance()
        assert world.orchestrator.starts[AGGREGATOR] == number + 1
    world.orchestrator.exit(AGGREGATOR, 1)
    world.advance()
    row = world.store.project(PROJECT)
    assert row.state is State.FAILED
    assert row.reason == (
        "the aggregator ended (exit code 1): MemoryError; given up after 3 restarts without progress"
        f" - see 'flops logs {PROJECT}'"
    )
    assert not any(status.live for status in world.orchestrator.list())


def test_what_the_aggregator_says_of_its_failure_is_the_projects_reason(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.advance()
    report = Report(1, 1.0, EventKind.TRAINING_FAILED, {"round": 2, "reason": "quorum was missed"})
    world.store.accept_reports(PROJECT, "aggregator", [report])
    world.orchestrator.exit(AGGREGATOR, 1)
    world.advance()
    assert world.store.project(PROJECT).reason == "quorum was missed"
    assert world.orchestrator.starts[AGGREGATOR] == 1


def test_a_model_that_cannot_be_exported_is_a_warning_and_its_parameters_are_kept(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.steps.failing["export-environment"] = FailedError("no mlflow for this Python")
    world.play()
    assert world.state() is State.FINISHED
    warnings = [
        event.data["message"] for event in world.store.events(PROJECT) if event.kind is EventKind.WARNING
    ]
    assert (
        "the model is kept as bare parameters, it could not be exported: no mlflow for this Python"
        in warnings
    )
    kinds = [entry.record.kind for entry in world.spool.read(PROJECT) if entry.record]
    assert "artifact" in kinds
    assert "model" not in kinds


def test_another_attempt_goes_on_behind_the_last_finished_step(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.steps.failing["lock"] = FailedError("no index answers")
    with pytest.raises(FailedError):
        world.advance()
    world.store.observe(PROJECT, Observation(failed=True), "no index answers")
    with pytest.raises(ConflictError, match="is failed - try again when it has ended"):
        world.store.retry(PROJECT)
    world.advance()
    assert world.store.retry(PROJECT) is State.SUBMITTED
    with pytest.raises(ConflictError, match="is submitted"):
        world.store.retry(PROJECT)
    world.steps.failing.clear()
    world.kill_and_start_again()
    world.play()
    project = world.store.project(PROJECT)
    assert (project.state, project.reason, project.rounds_done) == (State.FINISHED, None, 2)
    told = [step for kind, step in world.history() if kind == "step.started"]
    assert told[:4] == ["fetch", "check-contract", "lock", "lock"]


@pytest.mark.parametrize("ended", ["failed", "stopped"])
def test_another_attempt_trains_on_with_all_its_services(
    make_world: Callable[..., World], ended: str
) -> None:
    world = make_world()
    world.advance()
    round_1 = Report(1, 10.0, EventKind.ROUND_FINISHED, {"round": 1, "metrics": {"loss": 0.5}})
    failure = Report(2, 11.0, EventKind.TRAINING_FAILED, {"round": 2, "reason": "quorum was missed"})
    reports = [round_1, failure] if ended == "failed" else [round_1]
    world.store.accept_reports(PROJECT, "aggregator", reports)
    if ended == "stopped":
        world.store.observe(PROJECT, Observation(stop_requested=True), "stop was requested")
    world.advance()
    assert world.state() == ended
    assert world.store.retry(PROJECT) is State.SUBMITTED
    world.kill_and_start_again()
    world.advance()
    row = world.store.project(PROJECT)
    assert (row.state, row.training, row.finished, row.rounds_done) == (State.TRAINING, None, None, 1)
    assert set(world.orchestrator.starts.values()) == {2}
    end = {
        "rounds": 2,
        "best_round": 2,
        "model_file": str(world.folder / "model.safetensors"),
        "metrics": {"loss": 0.25},
    }
    reports = [
        Report(3, 20.0, EventKind.ROUND_FINISHED, {"round": 2, "metrics": {"loss": 0.25}}),
        Report(4, 21.0, EventKind.TRAINING_FINISHED, end),
    ]
    world.store.accept_reports(PROJECT, "aggregator", reports)
    world.play()
    assert (world.state(), world.store.project(PROJECT).best_round) == (State.FINISHED, 2)


class AgeingGround(ProgramGround):
    """Whose services have certificates that get old."""

    def __init__(self, settings: Settings, store: Store) -> None:
        super().__init__(settings, Ports(settings.home / "ports.json"), store)
        self.old: set[str] = set()
        self.issued: Counter[str] = Counter()

    def needs_certificate(self, project: ProjectId, service: Service) -> bool:
        return service.name in self.old

    def specification(self, project: ProjectId, spec: Any, service: Service, *others: Any) -> ServiceSpec:
        if service.name in self.old:
            self.old.remove(service.name)
            self.issued[service.name] += 1
        made = super().specification(project, spec, service, *others)
        number = self.issued[service.name]
        return replace(made, command=(*made.command, f"--certificate={number}")) if number else made


def test_services_are_started_again_one_by_one_before_their_certificates_are_over(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    ground = AgeingGround(world.settings, world.store)
    world.lifecycle._all = replace(world.lifecycle._all, ground=ground)
    world.advance()
    assert world.state() is State.TRAINING
    names = sorted(status.name for status in world.orchestrator.list(PROJECT))
    assert len(names) == 3
    world.clock.advance(3600)
    world.advance()
    assert world.orchestrator.starts == Counter(names)  # none is old
    ground.old = set(names)
    world.clock.advance(3600)
    for number in (1, 2, 3):
        world.advance()
        world.advance()  # a minute is to be between two
        assert sum(world.orchestrator.starts.values()) == 3 + number
        assert all(status.live for status in world.orchestrator.list(PROJECT))
        world.clock.advance(60)
    world.advance()
    assert world.orchestrator.starts == Counter(names) + Counter(names)
    assert [service.restarts for service in world.store.services(PROJECT)] == [0, 0, 0]
    world.play()
    assert world.state() is State.FINISHED
