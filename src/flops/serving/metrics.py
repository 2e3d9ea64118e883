"""What the server counts, in Prometheus's words."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)


class Metrics:
    """One server's; used by its event loop only."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "flops_serving_requests",
            "Scoring requests answered, by protocol and HTTP status",
            ["protocol", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "flops_serving_request_seconds",
            "From the head of a scoring request to its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_requests = Histogram(
            "flops_serving_batch_requests",
            "Requests predicted together",
            buckets=_COUNTS,
            registry=self._registry,
        )
        self.batch_rows = Histogram(
            "flops_serving_batch_rows",
            "Rows predicted together",
            buckets=_COUNTS,
            registry=self._registry,
        )
        self.predict_seconds = Histogram(
            "flops_serving_predict_seconds",
            "Time of one batch in the model",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._restarts = Counter(
            "flops_serving_predictor_restarts",
            "Predictors replaced, by reason",
            ["reason"],
            registry=self._registry,
        )
        for reason in ("crash", "timeout", "load"):
            self._restarts.labels(reason)
        self._counted: dict[tuple[str, int], Counter] = {}

    def watch(
        self, *, queued: Callable[[], int], in_flight: Callable[[], int], ready: Callable[[], int]
    ) -> None:
        """Ask for these numbers whenever somebody looks."""
        for name, text, ask in (
            ("queue_requests", "Requests that wait for a predictor", queued),
            ("requests_in_flight", "Requests that are read, wait or are worked on", in_flight),
            ("predictors_ready", "Predictors that hold the model", ready),
        ):
            Gauge(f"flops_serving_{name}", text, registry=self._registry).set_function(ask)

    def answered(self, protocol: str, status: int, seconds: float) -> None:
        counter = self._counted.get((protocol, status))
        if counter is None:
            counter = self._counted[protocol, status] = self._requests.labels(protocol, str(status))
        counter.inc()
        self._seconds.observe(seconds)

    def restarted(self, reason: str) -> None:
        self._restarts.labels(reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
