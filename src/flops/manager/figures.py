"""What the manager counts about itself, for Prometheus. Counters begin anew with each manager.

Thread-safe. What the database knows is asked for when somebody looks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from flops.core.events import EventKind
from flops.manager.reports import Report
from flops.manager.states import State

_STEP_BUCKETS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Figures:
    """One manager's. The API adds its own to ``registry``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._reports = Counter(
            "flops_reports", "Reports of services that were taken over", ["kind"], registry=self.registry
        )
        self._rounds = Counter(
            "flops_rounds", "Finished rounds, of roots and of clusters", ["where"], registry=self.registry
        )
        self._steps = Histogram(
            "flops_step_seconds",
            "How long finished steps of projects took",
            ["step"],
            registry=self.registry,
            buckets=_STEP_BUCKETS_S,
        )

    def accepted(self, reports: Sequence[Report]) -> None:
        for report in reports:
            self._reports.labels(report.kind.value).inc()
            if report.kind is EventKind.ROUND_FINISHED:
                self._rounds.labels("root").inc()
            elif report.kind is EventKind.CLUSTER_ROUND:
                self._rounds.labels("cluster").inc()

    def step_finished(self, step: str, duration_s: float) -> None:
        self._steps.labels(step).observe(duration_s)

    def watch_projects(self, count: Callable[[], Mapping[State, int]]) -> None:
        """Show how many projects there are in each state."""
        self.registry.register(_Projects(count))


class _Projects(Collector):
    def __init__(self, count: Callable[[], Mapping[State, int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield self._family(self._count())

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Without a look at the database."""
        yield self._family({})

    @staticmethod
    def _family(counts: Mapping[State, int]) -> GaugeMetricFamily:
        family = GaugeMetricFamily("flops_projects", "Projects by state", labels=["state"])
        for state in State:
            family.add_metric([state.value], counts.get(state, 0))
        return family
