"""Pages of projects, on a real database."""

from collections.abc import Sequence

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.core.errors import InvalidInputError
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.listing import Wanted
from flops.manager.rows import Model
from flops.manager.states import Observation, State
from flops.manager.store import Store
from flops.persistence import open_database


@pytest.fixture
def settings(settings_on_each_engine: Settings) -> Settings:
    return settings_on_each_engine


def create(store: Store, project: str, name: str = "mnist", **values: str) -> None:
    store.create_project(
        ProjectId(project), name=name, spec={}, source=f"/srv/{name}", rounds_total=3, **values
    )


def ids(store: Store, wanted: Wanted) -> list[str]:
    return [project["id"] for project in store.page(wanted).projects]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 20])
def test_pages_together_hold_every_project_once_the_newest_first(
    store: Store, clock: ManualClock, limit: int
) -> None:
    for number in range(7):
        create(store, f"p-{number}aaaa")
        if number % 3 == 0:  # others were made at the same moment
            clock.advance(1.5)
    expected = [str(row.id) for row in store.projects()]
    found: list[str] = []
    after = None
    while True:
        page = store.page(Wanted(limit=limit, after=after))
        found += [project["id"] for project in page.projects]
        if (after := page.next) is None:
            break
        assert len(page.projects) == limit
    assert found == expected


def test_projects_that_come_and_go_meanwhile_neither_repeat_nor_hide_others(
    store: Store, clock: ManualClock
) -> None:
    for number in range(4):
        create(store, f"p-{number}aaaa")
        clock.advance(1)
    page = store.page(Wanted(limit=2))
    assert [project["id"] for project in page.projects] == ["p-3aaaa", "p-2aaaa"]
    create(store, "p-9aaaa")
    last = ProjectId("p-2aaaa")  # the cursor's own
    store.observe(last, Observation(stop_requested=True))
    store.observe(last, Observation(services_gone=True))
    store.set_cleaned(last)
    store.delete_project(last)
    assert ids(store, Wanted(after=page.next)) == ["p-1aaaa", "p-0aaaa"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(states=[State.FAILED]), ["p-2aaaa"]),
        (Wanted(states=[State.FAILED, State.SUBMITTED]), ["p-3aaaa", "p-2aaaa", "p-1aaaa"]),
        (Wanted(name="mnist"), ["p-1aaaa"]),
        (Wanted(text="MNIST"), ["p-3aaaa", "p-1aaaa"]),
        (Wanted(text="no such BRANCH"), ["p-2aaaa"]),
        (Wanted(text="%"), []),
        (Wanted(text="_"), ["p-3aaaa"]),
        (Wanted(text="2aa"), ["p-2aaaa"]),
        (Wanted(user="anna"), ["p-3aaaa"]),
        (Wanted(user="bert", teams=["blue"]), ["p-3aaaa", "p-1aaaa"]),
        (Wanted(user="bert", teams=["red"], text="mnist"), ["p-1aaaa"]),
    ],
)
def test_filters_are_the_databases(
    store: Store, clock: ManualClock, wanted: Wanted, expected: Sequence[str]
) -> None:
    create(store, "p-1aaaa", "mnist", owner="bert")
    clock.advance(1)
    create(store, "p-2aaaa", "digits")
    clock.advance(1)
    create(store, "p-3aaaa", "mnist_2", owner="anna", team="blue")
    store.observe(ProjectId("p-2aaaa"), Observation(begun=True))
    store.observe(ProjectId("p-2aaaa"), Observation(failed=True), "no such branch")
    assert ids(store, wanted) == expected


def test_a_page_shows_the_newest_model_and_takes_two_queries(store: Store, settings: Settings) -> None:
    for number in range(5):
        create(store, f"p-{number}aaaa")
    for version in (1, 2):
        model = Model(
            "mnist", version, ProjectId("p-1aaaa"), 1, {}, float(version), f"models:/mnist/{version}", None
        )
        store.add_model(model)
    engine = open_database(settings.database_url or settings.database)
    asked: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    again = Store(engine)
    models = {project["id"]: project["model"] for project in again.page(Wanted()).projects}
    assert models["p-1aaaa"] == {"name": "mnist", "version": 2, "uri": "models:/mnist/2"}
    assert models["p-0aaaa"] is None
    assert len([statement for statement in asked if statement.startswith("SELECT")]) == 2
    again.close()


@pytest.mark.parametrize("limit", [1, 2, 5, 20])
def test_pages_of_models_hold_every_version_once(store: Store, limit: int) -> None:
    create(store, "p-1aaaa")
    for number in range(6):
        name, created = f"m-{number % 2}", float(number // 4)
        store.add_model(Model(name, number + 1, ProjectId("p-1aaaa"), 1, {}, created, "uri", None))
    found: list[Model] = []
    after = None
    while True:
        models, after = store.page_of_models(None, after, limit)
        found += models
        if after is None:
            break
        assert len(models) == limit
    assert [(model.name, model.version) for model in found] == [
        ("m-0", 5), ("m-1", 6), ("m-0", 1), ("m-0", 3), ("m-1", 2), ("m-1", 4),
    ]  # fmt: skip
    assert {model.name for model in store.page_of_models("m-1", None, 10)[0]} == {"m-1"}


@pytest.mark.parametrize("cursor", ["", "1.0", "1.0~x~m", "nan~1~m", "1.0~0~m", f"1.0~{2**31}~m"])
def test_a_models_cursor_that_is_none_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidInputError, match="is no cursor"):
        store.page_of_models(None, cursor, 10)


@pytest.mark.parametrize("cursor", ["", "x", "1.0", "nan~p-1aaaa", "1.0~nonsense", "~p-1aaaa", "inf~p-1aaaa"])
def test_a_cursor_that_is_none_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(InvalidInputError, match="is no cursor - send 'next' of the page before"):
        store.page(Wanted(after=cursor))
