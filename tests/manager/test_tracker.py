from collections.abc import Mapping
from typing import Any

import pytest

from flops.core.events import EventKind
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.reports import Report
from flops.manager.store import Store
from flops.manager.tracker import Tracker
from flops.tracking import RoundMetrics, Spool

PROJECT = ProjectId("p-7k2mqd")
ROUND = {
    "round": 2,
    "participants": 3,
    "cohort": 4,
    "left_out": {"learner-4": "enough others were quicker"},
    "train_metrics": {"loss": 0.5},
    "metrics": {"loss": 0.25, "accuracy": None},
    "learners": {"learner-1": {"loss": 0.125}},
    "duration_s": 1.5,
    "bytes_up": 10,
    "fit_s": {"learner-1": 0.1},
}


def shipped(
    store: Store, settings: Settings, *reports: tuple[EventKind, Mapping[str, Any]], clusters: bool = False
) -> list[RoundMetrics]:
    spec = {"repo": "/r", "tracking": {"clusters": clusters}}
    store.create_project(PROJECT, name="mnist", spec=spec, source="/r", rounds_total=3)
    store.accept_reports(
        PROJECT,
        "aggregator",
        [Report(seq, float(seq), kind, data) for seq, (kind, data) in enumerate(reports, start=1)],
    )
    spool = Spool(settings.spool_dir)
    tracker = Tracker(spool, store)
    tracker.ship(PROJECT)
    tracker.ship(PROJECT)  # nothing is new
    records = [entry.record for entry in spool.read(PROJECT)]
    return [record for record in records if isinstance(record, RoundMetrics)]


def test_a_round_becomes_metrics_of_the_run_and_of_its_learners(store: Store, settings: Settings) -> None:
    (record,) = shipped(store, settings, (EventKind.ROUND_FINISHED, ROUND))
    assert (record.time, record.step, record.cluster) == (1.0, 2, None)
    assert record.metrics == {
        "loss": 0.25,
        "train_loss": 0.5,
        "round_duration_s": 1.5,
        "round_bytes_up": 10.0,
        "learner-1/loss": 0.125,
        "participants": 3.0,
        "left_out": 1.0,
    }


def test_an_asynchronous_round_tells_how_stale_its_updates_were(store: Store, settings: Settings) -> None:
    data = {**ROUND, "version": 7, "staleness": {"mean": 1.5, "max": 4}}
    (record,) = shipped(store, settings, (EventKind.ROUND_FINISHED, data))
    assert record.metrics["version"] == 7.0
    assert (record.metrics["staleness_mean"], record.metrics["staleness_max"]) == (1.5, 4.0)


@pytest.mark.parametrize("clusters", [False, True])
def test_rounds_of_clusters_are_tracked_where_the_spec_asks_for_it(
    store: Store, settings: Settings, clusters: bool
) -> None:
    inner = {**ROUND, "round": 4, "cluster": "europe/north"}
    reports = [(EventKind.CLUSTER_ROUND, inner), (EventKind.ROUND_FINISHED, {**ROUND, "cycle": 2})]
    found = shipped(store, settings, *reports, clusters=clusters)
    expected = [("europe/north", 4), (None, 2)] if clusters else [(None, 2)]
    assert [(record.cluster, record.step) for record in found] == expected
