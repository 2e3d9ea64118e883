"""What a member with a valid token can say, and what it cannot bring about with it."""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest

from flops.federation import Member, wire
from flops.federation.hub import Hub, Server
from flops.federation.placement import COMMAND, Placement
from flops_worker.tensors import Layout

Start = Callable[..., Any]
Clusters = Callable[..., Any]
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}
CLUSTERS = {
    "c0": Member("token-of-c0", slot=1, kind="cluster"),
    "c1": Member("token-of-c1", slot=11, kind="cluster"),
}


@pytest.mark.parametrize("depth", [17, 100, 900])
def test_a_header_that_is_nested_too_deeply_ends_its_session_alone(start: Start, depth: int) -> None:
    """What parses in a shallow thread may be too deep to print in a deeper one."""
    federation = start(learners=2, rounds=2, round_deadline_s=1.0, fraction_evaluate=0.0, **ONE)
    federation.learner("a")
    client, writer, reader, _ = federation.exchange("b")
    wire.receive(reader)
    writer.write_metadata(b'{"t":"result","version":0,"task":' + b"[" * depth + b"]" * depth + b"}")
    federation.result()
    assert "nested too deeply" in federation.wait_for("learner.left")[0]["reason"]
    reader.cancel()
    client.close()


def test_words_that_no_database_takes_are_replaced(start: Start) -> None:
    federation = start(learners=2, rounds=1, **ONE)
    client, writer, reader, _ = federation.exchange("b")
    writer.write_metadata(b'{"t":"failed","message":"\\ud800 is half a character","where":"x"}')
    federation.wait_for("learner.left")
    federation.learner("a")
    federation.result()
    reader.cancel()
    client.close()
    (left,) = federation.reports("learner.left")
    assert left["reason"].encode().decode() == "? is half a character"


@pytest.mark.parametrize("strategy", ["FedMedian", "Krum"])
def test_a_metric_that_one_learner_alone_reports_ends_no_robust_training(start: Start, strategy: str) -> None:
    federation = start(learners=3, rounds=1, strategy=strategy, **ONE)
    federation.learner("a")
    federation.learner("b")
    federation.learner("c", change=lambda header: {**header, "metrics": {"mine": 1.0}})
    federation.result()


def test_an_update_without_the_loss_that_weighs_it_is_refused(start: Start) -> None:
    parameters = {"client_learning_rate": 0.1}
    federation = start(learners=3, rounds=1, strategy="QFedAvg", strategy_parameters=parameters, **ONE)
    for name in "ab":
        federation.learner(name, change=lambda header: {**header, "metrics": {"train_loss": 1.0}})
    federation.learner("c")
    federation.result()
    (refused,) = federation.reports("update.refused")
    assert refused["learner"] == "c"


def test_names_of_metrics_are_bounded(start: Start) -> None:
    federation = start(learners=4, rounds=1, **ONE)
    for name in "abcd":
        metrics = {f"{name}-{number}": 1.0 for number in range(100)}
        federation.learner(name, change=lambda header, metrics=metrics: {**header, "metrics": metrics})
    federation.result()
    assert len(federation.reports("round.finished")[0]["train_metrics"]) == 200


def test_one_learner_does_not_decide_the_metrics_by_claiming_examples(start: Start) -> None:
    federation = start(learners=2, rounds=1, max_examples=100, **ONE)
    federation.learner("a", evaluate=lambda parameters, _: (1.0, 0.5, 50))
    federation.learner("b", evaluate=lambda parameters, _: (0.0, 1.0, 1 << 40))
    assert federation.result().metrics["loss"] == 1.0


def test_a_learner_cannot_have_its_cluster_ejected_by_claiming_many_evaluated_examples(
    start: Start, cluster: Clusters
) -> None:
    root = start(members=CLUSTERS, rounds=5, **ONE)
    one = cluster(root, "c0", {"a": 1, "b": 2}, rounds=1, cycles=5)
    two = cluster(root, "c1", {"c": 11}, rounds=1, cycles=5)
    one.learner("a")
    two.learner("c")
    one.learner("b", evaluate=lambda parameters, _: (1.0, 0.5, 1 << 40))
    root.result()
    assert not root.reports("learner.ejected")


def test_a_learner_cannot_have_its_cluster_ejected_by_large_numbers(start: Start, cluster: Clusters) -> None:
    arrays = [np.zeros((3, 2), np.float64)]
    root = start(members=CLUSTERS, rounds=5, arrays=arrays, fraction_evaluate=0.0, **ONE)
    one = cluster(root, "c0", {"a": 1, "b": 2}, rounds=1, cycles=5)
    two = cluster(root, "c1", {"c": 11}, rounds=1, cycles=5)
    one.learner("a")
    two.learner("c")
    one.learner("b", fit=lambda parameters, _: ([np.full_like(p, 9e289) for p in parameters], 100))
    root.result()
    assert not root.reports("learner.ejected")


def test_a_learner_that_fails_first_may_not_connect_for_ever(start: Start) -> None:
    federation = start(learners=2, rounds=2, **ONE)
    stop = threading.Event()

    def wait(parameters: Any, _: int) -> tuple[Any, int]:
        stop.wait(30)
        return parameters, 10

    federation.learner("a", fit=wait)
    with contextlib.suppress(StopIteration, flight.FlightError, OSError, KeyError):
        for _ in range(150):
            client, writer, reader, _ = federation.exchange("b")
            wire.send(writer, {"t": "failed", "message": "x"})
            time.sleep(0.01)
            reader.cancel()
            client.close()
            if federation.reports("learner.ejected"):
                break
    federation.wait_for("learner.ejected")
    stop.set()
    federation.result()


def test_placement_exchanges_of_one_learner_are_bounded(tmp_path: Path) -> None:
    """One that never answers a ping holds a thread; it may not hold a hundred."""
    layout = Layout.of([np.zeros(2, np.float32)])
    hub = Hub("p", layout, {"c0": Member("tc", slot=1, kind="cluster")})
    placement = Placement(tmp_path / "p.json", ["a", "b"], {"c0": "grpc://x"}, 60.0)
    location = f"grpc+unix://{tmp_path}/s.sock"
    server = Server(location, hub, None, placement, {"a": Member("ta"), "b": Member("tb")})
    questions = []
    asked = refused = 0
    for _ in range(30):
        client = flight.FlightClient(location)
        options = flight.FlightCallOptions(headers=[(b"authorization", b"Bearer ta")])
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(COMMAND), options)
        questions.append((client, writer, reader))
        with contextlib.suppress(flight.FlightError):
            writer.begin(wire.SCHEMA)
    for _, _, reader in questions:
        try:
            asked += wire.receive(reader).kind == "ping"
        except flight.FlightUnavailableError:
            refused += 1
    assert (asked, refused) == (8, 22)
    for client, _, reader in questions:
        reader.cancel()
        client.close()
    server.shutdown()
