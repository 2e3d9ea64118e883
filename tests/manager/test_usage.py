"""What ran on whose data, from what the store holds."""

from typing import Any

from flops.core.clock import ManualClock
from flops.core.events import EventKind
from flops.core.ids import LearnerId, ProjectId
from flops.manager.reports import Report
from flops.manager.rows import Learner
from flops.manager.states import Observation
from flops.manager.store import Store

FIRST, SECOND = ProjectId("p-222222"), ProjectId("p-333333")


def fill(store: Store, clock: ManualClock) -> None:
    for project, owner, team, tag, sites in (
        (FIRST, "ann", None, "scans", ("north", "south")),
        (SECOND, "bob", "blue", "notes", ("north",)),
    ):
        clock.advance(1)
        store.create_project(project, name="x", spec={}, source="/r", rounds_total=1, owner=owner, team=team)
        store.observe(project, Observation(begun=True))
        store.start_step(project, "fetch")
        store.finish_step(project, "fetch", {"path": "/c", "commit": f"commit-{owner}"})
        store.start_step(project, "data")
        learners = [Learner(LearnerId(f"learner-{at}"), at, site) for at, site in enumerate(sites, start=1)]
        store.finish_step(project, "data", {"tags": [tag]}, learners=learners)
    both, one = {"learner-1": 0.1, "learner-2": 0.2}, {"learner-1": 0.1}
    reports = [
        Report(1, 1.0, EventKind.ROUND_FINISHED, {"round": 1, "fit_s": both, "bytes_up": 200}),
        Report(2, 2.0, EventKind.ROUND_FINISHED, {"round": 2, "fit_s": one, "bytes_up": 100}),
    ]
    store.accept_reports(FIRST, "aggregator", reports)


def told(store: Store, **wanted: Any) -> list[tuple[Any, ...]]:
    return [
        (one["project"], one["site"], one["commit"], one["updates"], one["bytes_out"])
        for one in store.uses_of_data(**wanted)
    ]


def test_every_site_sees_what_ran_and_what_left_it(store: Store, clock: ManualClock) -> None:
    fill(store, clock)
    assert told(store) == [
        (SECOND, "north", "commit-bob", 0, 0),
        (FIRST, "north", "commit-ann", 2, 200),
        (FIRST, "south", "commit-ann", 1, 100),
    ]
    assert store.uses_of_data(site="south")[0]["tags"] == ["scans"]


def test_uses_are_filtered(store: Store, clock: ManualClock) -> None:
    fill(store, clock)
    assert [one[:2] for one in told(store, site="south")] == [(FIRST, "south")]
    assert [one[:2] for one in told(store, tag="notes")] == [(SECOND, "north")]
    assert [one[0] for one in told(store, user="ann")] == [FIRST, FIRST]
    assert [one[0] for one in told(store, user="eve", teams=["blue"])] == [SECOND]
    assert told(store, user="eve") == []
    assert len(told(store, limit=1)) == 1
