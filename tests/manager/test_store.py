"""The store, on SQLite and on PostgreSQL."""

import sqlite3
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, InvalidInputError, NotFoundError
from flops.core.events import EventKind
from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.core.settings import Settings
from flops.fleet import tables as _fleet  # noqa: F401 - its tables belong to the metadata
from flops.identity import tables as _identity  # noqa: F401 - its tables belong to the metadata
from flops.manager import tables
from flops.manager.reports import Report, parse_report
from flops.manager.rows import Learner, Model, Service
from flops.manager.states import Observation, State
from flops.manager.store import Store, Superseded
from flops.persistence import connect, metadata, migrate, open_database, reading, writing


@pytest.fixture
def settings(settings_on_each_engine: Settings) -> Settings:
    return settings_on_each_engine


@pytest.fixture(autouse=True)
def held_to_telling(store: Store) -> None:
    """What a method of the store changes, it tells of: answers of reads are kept until then."""
    told: list[ProjectId] = []
    store.on_change = told.append
    for name, method in vars(Store).items():
        if not name.startswith("_") and name not in ("close", "one_view") and callable(method):
            setattr(store, name, _telling(name, getattr(store, name), store, told))


def _telling(
    name: str, method: Callable[..., Any], store: Store, told: list[ProjectId]
) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        before, so_far = _rows(store), len(told)
        try:
            return method(*arguments, **options)
        finally:
            assert len(told) > so_far or _rows(store) == before, f"Store.{name} changed rows, told nobody"

    return call


def _rows(store: Store) -> list[Any]:
    names = (tables.projects, tables.learners, tables.clusters, tables.services, tables.models, tables.events)
    with reading(store._engine) as connection:
        return [connection.execute(sa.select(table)).fetchall() for table in names]


def database_of(settings: Settings) -> Path | str:
    return settings.database_url or settings.database


def test_a_change_of_state_and_its_event_are_there_together(store: Store, project: ProjectId) -> None:
    store.observe(project, Observation(begun=True))
    store.observe(project, Observation(failed=True), "no such branch")
    row = store.project(project)
    assert (row.state, row.reason) == (State.FAILED, "no such branch")
    assert [(event.seq, event.data["state"]) for event in store.events(project)] == [
        (1, "submitted"),
        (2, "preparing"),
        (3, "failed"),
    ]


def test_everything_is_still_there_after_the_file_is_opened_again(
    store: Store, project: ProjectId, settings: Settings
) -> None:
    store.observe(project, Observation(begun=True))
    store.close()
    again = Store(open_database(database_of(settings)))
    assert again.project(project).state is State.PREPARING
    assert again.unsettled() == [project]
    again.close()


def test_the_migrations_make_exactly_the_tables_of_the_code(settings: Settings) -> None:
    engine = open_database(database_of(settings))
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_one_view_is_of_one_moment_in_its_thread_and_ends(store: Store, project: ProjectId) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(len(store.events(project)))

    def add() -> None:
        store.add_event(project, EventKind.WARNING, {"message": "x"})
        look()

    with store.one_view():
        look()
        with store.one_view():
            look()
        other = threading.Thread(target=add)
        other.start()
        other.join()
        look()
        with pytest.raises(AssertionError, match="would not be seen"):
            store.add_event(project, EventKind.WARNING, {"message": "y"})
    look()
    assert seen == [1, 1, 2, 1, 2]


def test_projects_begin_in_the_order_in_which_they_came_as_many_as_may_run(
    store: Store, clock: ManualClock
) -> None:
    names = [ProjectId(f"p-22222{letter}") for letter in "dcba"]  # not the order of their names
    for name in names:
        store.create_project(name, name="x", spec={}, source="/r", rounds_total=1)
        clock.advance(1)
    assert not store.begin(names[2], running=2)
    assert store.project(names[2]).reason == "0 projects run, 2 wait before this one"
    assert store.begin(names[1], running=2)
    assert store.begin(names[0], running=2)
    assert store.begin(names[0], running=2)  # again: it has begun
    assert not store.begin(names[2], running=2)
    assert store.project(names[2]).reason == "2 projects run, 0 wait before this one"
    assert not store.begin(names[3], running=2)
    store.observe(names[0], Observation(failed=True), "broken")
    assert not store.begin(names[3], running=2)
    assert store.begin(names[2], running=2)
    assert store.project(names[2]).reason is None
    states = [event.data["state"] for event in store.events(names[2])]
    assert states == ["submitted", "preparing"]


def test_who_is_resumed_or_extended_waits_for_a_place_as_well(store: Store, clock: ManualClock) -> None:
    paused, finished, other = (ProjectId(f"p-22222{letter}") for letter in "abc")
    ways = {
        paused: [Observation(pause_requested=True), Observation(services_gone=True)],
        finished: [Observation(**{seen: True}) for seen in ("prepared", "deployed", "trained", "packaged")],
        other: [],
    }
    for name, way in ways.items():
        store.create_project(name, name="x", spec={}, source="/r", rounds_total=1)
        clock.advance(1)
        assert store.begin(name, running=1)
        for seen in way:
            store.observe(name, seen)
    store.set_cleaned(finished)
    assert store.observe(paused, Observation(resume_requested=True)) is State.SUBMITTED
    assert store.extend(finished, 2) is State.SUBMITTED
    assert not store.begin(paused, running=1)
    assert not store.begin(finished, running=1)
    assert store.project(finished).reason == "1 projects run, 1 wait before this one"
    store.observe(other, Observation(failed=True), "broken")
    assert not store.begin(finished, running=1)
    assert store.begin(paused, running=1)
    assert store.unsettled() == [paused, finished, other]


def test_a_database_of_an_older_version_is_brought_up_to_date(settings: Settings) -> None:
    engine = connect(database_of(settings))
    with writing(engine) as connection:
        migrate(connection, "base")
        migrate(connection, "0001")
        for statement in (
            "INSERT INTO projects (id, name, state, spec, source, created, updated, last_seq, spooled_seq,"
            " rounds_done, rounds_total, cleaned)"
            " VALUES ('p-7k2mqd', 'mnist', 'training', '{}', '/r', 1.0, 1.0, 0, 0, 1, 3, false)",
            "INSERT INTO report_sources VALUES ('p-7k2mqd', 'aggregator', 7)",
            "INSERT INTO learners VALUES ('p-7k2mqd', 'learner-1', 1, 'a', 'connected', NULL)",
            "INSERT INTO services VALUES ('p-7k2mqd', 'p-7k2mqd-aggregator', 'aggregator', NULL, 2, NULL)",
        ):
            connection.execute(sa.text(statement))
    engine.dispose()
    store = Store(open_database(database_of(settings)))
    project = ProjectId("p-7k2mqd")
    assert store.learners(project) == [Learner(LearnerId("learner-1"), 1, "a", "connected")]
    assert [service.restarts for service in store.services(project)] == [2]
    assert store.clusters(project) == []
    assert store.accept_reports(project, "aggregator", [Report(7, 1.0, EventKind.WARNING, {})]) == 7
    assert store.accept_reports(project, "europe/north", [Report(1, 1.0, EventKind.WARNING, {})]) == 1
    store.close()


def test_a_file_is_private_and_in_wal_mode(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_database(settings.database).dispose()
    assert settings.database.stat().st_mode & 0o777 == 0o600
    connection = sqlite3.connect(settings.database)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_events_of_many_threads_are_numbered_without_gaps(store: Store, project: ProjectId) -> None:
    def write() -> None:
        for _ in range(20):
            store.add_event(project, EventKind.WARNING, {"message": "m"})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.seq for event in store.events(project)] == list(range(1, 82))


def test_a_report_that_is_sent_again_counts_once(store: Store, project: ProjectId) -> None:
    reports = [
        Report(1, 5.0, EventKind.ROUND_STARTED, {"round": 1}),
        Report(2, 6.0, EventKind.ROUND_FINISHED, {"round": 1, "metrics": {"loss": 0.5}}),
    ]
    assert store.accept_reports(project, "aggregator", reports[:1]) == 1
    assert store.accept_reports(project, "aggregator", reports) == 2
    assert store.accept_reports(project, "aggregator", reports) == 2
    kinds = [event.kind for event in store.events(project)]
    assert kinds == [EventKind.PROJECT_STATE, EventKind.ROUND_STARTED, EventKind.ROUND_FINISHED]
    row = store.project(project)
    assert (row.rounds_done, row.metrics) == (1, {"loss": 0.5})


def test_a_round_gives_their_chances_back_to_those_who_took_part(store: Store, project: ProjectId) -> None:
    store.observe(project, Observation(begun=True))
    services = [
        Service(ServiceName("p-7k2mqd-aggregator"), "aggregator", None),
        Service(ServiceName("p-7k2mqd-agent-1"), "agent", LearnerId("learner-1")),
        Service(ServiceName("p-7k2mqd-agent-2"), "agent", LearnerId("learner-2")),
    ]
    store.want_services(project, services)
    for service in services:
        store.count_restart(project, service.name, "it was killed")
    report = parse_report(1, 1.0, "round.finished", {"round": 1, "fit_s": {"learner-2": 0.5}})
    store.accept_reports(project, "aggregator", [report])
    restarts = {service.learner or service.role: service.restarts for service in store.services(project)}
    assert restarts == {"aggregator": 0, "learner-1": 1, "learner-2": 0}


def test_reports_after_the_end_are_acknowledged_and_dropped(store: Store, project: ProjectId) -> None:
    store.observe(project, Observation(failed=True), "because")
    report = Report(1, 5.0, EventKind.ROUND_FINISHED, {"round": 1, "metrics": {}})
    assert store.accept_reports(project, "aggregator", [report]) == 1
    assert store.events(project)[-1].kind is EventKind.PROJECT_STATE
    assert store.project(project).rounds_done == 0


def test_a_learner_connects_and_leaves_with_its_reason(store: Store, project: ProjectId) -> None:
    store.start_step(project, "data")
    store.finish_step(project, "data", {}, learners=[Learner(LearnerId("learner-1"), 1, "local")])
    store.accept_reports(
        project,
        "aggregator",
        [
            Report(1, 1.0, EventKind.LEARNER_CONNECTED, {"learner": "learner-1"}),
            Report(2, 2.0, EventKind.LEARNER_LEFT, {"learner": "learner-1", "reason": "it crashed"}),
        ],
    )
    assert store.learners(project) == [Learner(LearnerId("learner-1"), 1, "local", "left", "it crashed")]


def test_what_clusters_and_their_root_report_is_kept_apart(store: Store, project: ProjectId) -> None:
    store.start_step(project, "data")
    learners = [Learner(LearnerId(f"learner-{number}"), number, f"site-{number}") for number in (1, 2)]
    store.finish_step(project, "data", {}, learners=learners)
    store.start_step(project, "clusters")
    clusters = {"europe/north": ["learner-1"], "asia": ["learner-2"]}
    store.finish_step(project, "clusters", {}, clusters=clusters)
    assert [(one.cluster, one.number) for one in store.clusters(project)] == [
        ("asia", 1),
        ("europe", 2),
        ("europe/north", 3),
    ]
    assert [one.cluster for one in store.learners(project)] == ["europe/north", "asia"]
    inner = [
        Report(1, 1.0, EventKind.LEARNER_CONNECTED, {"cluster": "asia", "learner": "learner-2"}),
        Report(2, 2.0, EventKind.CLUSTER_ROUND, {"cluster": "asia", "round": 4, "metrics": {"loss": 9.0}}),
        Report(
            3, 3.0, EventKind.LEARNER_EJECTED, {"cluster": "asia", "learner": "learner-2", "reason": "NaN"}
        ),
        Report(4, 4.0, EventKind.LEARNER_LEFT, {"cluster": "asia", "learner": "learner-2", "reason": "left"}),
    ]
    assert store.accept_reports(project, "asia", inner) == 4
    of_root = [
        Report(1, 5.0, EventKind.CLUSTER_CONNECTED, {"cluster": "asia"}),
        Report(2, 6.0, EventKind.CLUSTER_LEFT, {"cluster": "europe", "reason": "its connection broke"}),
        Report(3, 7.0, EventKind.ROUND_FINISHED, {"round": 2, "cycle": 2, "metrics": {"loss": 0.5}}),
        Report(4, 8.0, EventKind.TRAINING_FINISHED, {"rounds": 2, "best_round": 2}),
        Report(5, 9.0, EventKind.CLUSTER_LEFT, {"cluster": "asia", "reason": "the training is over"}),
    ]
    assert store.accept_reports(project, "aggregator", of_root) == 5
    found = [(one.cluster, one.state, one.reason, one.rounds_done) for one in store.clusters(project)]
    assert found == [
        ("asia", "connected", None, 4),
        ("europe", "left", "its connection broke", 0),
        ("europe/north", "waiting", None, 0),
    ]
    assert [(one.state, one.reason) for one in store.learners(project)] == [
        ("waiting", None),
        ("ejected", "NaN"),
    ]
    row = store.project(project)
    assert (row.rounds_done, row.metrics) == (2, {"loss": 0.5})


def test_clusters_that_the_root_forms_are_taken_over(store: Store, project: ProjectId) -> None:
    store.start_step(project, "data")
    store.finish_step(project, "data", {}, learners=[Learner(LearnerId("learner-1"), 1, "a")])
    store.start_step(project, "clusters")
    store.finish_step(project, "clusters", {}, clusters={"cluster-1": [], "cluster-2": []})
    data = {"clusters": {"cluster-1": [], "cluster-2": ["learner-1"]}, "round_trip_ms": {"learner-1": 0.3}}
    store.accept_reports(project, "aggregator", [Report(1, 1.0, EventKind.CLUSTERS_FORMED, data)])
    assert [one.cluster for one in store.learners(project)] == ["cluster-2"]


def test_nan_in_a_report_becomes_null() -> None:
    report = parse_report(1, 1.0, "round.finished", {"round": 1, "metrics": {"loss": float("nan")}})
    assert report.data == {"round": 1, "metrics": {"loss": None}}


@pytest.mark.parametrize("kind", ["project.state", "step.finished", "model.registered", "no.such"])
def test_a_service_cannot_report_what_only_the_manager_knows(kind: str) -> None:
    with pytest.raises(InvalidInputError, match="a service may report"):
        parse_report(1, 1.0, kind, {})


def test_a_step_that_ends_after_the_stop_leaves_no_trace(store: Store, project: ProjectId) -> None:
    store.observe(project, Observation(begun=True))
    store.start_step(project, "fetch")
    store.observe(project, Observation(stop_requested=True), "stop was requested")
    with pytest.raises(Superseded):
        store.finish_step(project, "fetch", {"commit": "c"})
    assert store.steps(project) == {}
    assert store.events(project)[-1].data["state"] == "stopping"


def test_a_repeated_step_is_told_of_once(store: Store, project: ProjectId, clock: ManualClock) -> None:
    store.start_step(project, "lock")
    store.start_step(project, "lock")
    clock.advance(2.5)
    store.finish_step(project, "lock", {"hash": "h", "warnings": ["old python"]})
    store.finish_step(project, "lock", {"hash": "other"})
    assert store.steps(project) == {"lock": {"hash": "h", "warnings": ["old python"]}}
    told = [(event.kind, dict(event.data)) for event in store.events(project)[1:]]
    assert told == [
        (EventKind.STEP_STARTED, {"step": "lock"}),
        (EventKind.WARNING, {"message": "old python"}),
        (EventKind.STEP_FINISHED, {"step": "lock", "duration_s": 2.5}),
    ]


def test_only_a_project_at_its_end_can_be_deleted_and_its_models_stay(
    store: Store, project: ProjectId
) -> None:
    store.want_services(project, [Service(ServiceName("p-7k2mqd-aggregator"), "aggregator", None)])
    with pytest.raises(ConflictError, match=f"project {project} is submitted - stop it first"):
        store.delete_project(project)
    store.add_model(Model("mnist", 1, project, 3, {"loss": 0.1}, 1.0, "models:/mnist/1", None))
    store.observe(project, Observation(failed=True), "because")
    store.set_cleaned(project)
    store.delete_project(project)
    with pytest.raises(NotFoundError, match=f"there is no project {project} - see 'flops ls'"):
        store.project(project)
    assert [model.version for model in store.models()] == [1]
    assert store.services(project) == []


def test_a_model_is_registered_once(store: Store, project: ProjectId) -> None:
    model = Model("mnist", 1, project, 3, {"loss": 0.1}, 1.0, "models:/mnist/1", None)
    store.add_model(model)
    store.add_model(model)
    assert [event.kind for event in store.events(project)].count(EventKind.MODEL_REGISTERED) == 1
    assert store.model("mnist", 1) == model
    with pytest.raises(NotFoundError, match="there is no version 2 of a model 'mnist'"):
        store.model("mnist", 2)
