"""A real aggregator in a thread, and learners that speak the real protocol and do what a test tells them."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from flops.core.clock import SystemClock
from flops.core.errors import FlopsError
from flops.federation import AggregatorConfig, Link, Member, Plan, wire
from flops.federation.asynchronous import AsynchronousTraining
from flops.federation.blocks import blocks
from flops.federation.checkpoint import Checkpoint
from flops.federation.cluster import Cluster
from flops.federation.flower import claim_process
from flops.federation.hub import Hub, Server
from flops.federation.model_file import layout_digest
from flops.federation.reports import Reporter
from flops.federation.strategies import ASYNCHRONOUS
from flops.federation.training import Outcome, SynchronousTraining
from flops_worker.tensors import Layout, read_layout, views, write

Arrays = list[np.ndarray[Any, Any]]


def connect(location: str, token: str) -> tuple[Any, Any, Any]:
    """Open an exchange: client, writer and reader."""
    client = flight.FlightClient(location)
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())])
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"test"), options)
    writer.begin(wire.SCHEMA)
    return client, writer, reader


class Learner:
    """A learner without an agent: connects, answers every task with ``fit``, and can misbehave in between."""

    def __init__(
        self,
        location: str,
        name: str,
        token: str,
        fit: Callable[[Arrays, int], tuple[Arrays, int]] | None = None,
        change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        evaluate: Callable[[Arrays, int], tuple[float, float, int]] | None = None,
        fails: str | None = None,
    ) -> None:
        """Args: fails is the reason why its code cannot even be loaded."""
        self.name = name
        self.stopped = threading.Event()
        self.refusals: list[str] = []
        self.error: BaseException | None = None
        self._location, self._token = location, token
        self._fit = fit or (lambda parameters, _: ([p + 1 for p in parameters], 10))
        self._change = change or (lambda header: header)
        self._evaluate = evaluate or (lambda parameters, _: (1.0, 0.5, 10))
        self._fails = fails
        self._thread = threading.Thread(target=self._run, name=f"learner-{name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 10.0) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"{self.name} did not end"

    def _run(self) -> None:
        try:
            client, writer, reader = connect(self._location, self._token)
            try:
                wire.send(writer, {"t": "hello", "learner": self.name})
                welcome = wire.receive(reader)
                if welcome.kind == "stop":
                    return
                layout = Layout.from_header(welcome.header["layout"])
                if self._fails is not None:
                    wire.send(writer, {"t": "failed", "where": "load", "message": self._fails})
                else:
                    wire.send(writer, {"t": "ready", "allows_metrics": True})
                self._serve(writer, reader, layout)
            finally:
                reader.cancel()
                client.close()
        except (StopIteration, OSError, flight.FlightError, pa.ArrowException) as error:
            self.error = error  # its session ended, in order or not
        finally:
            self.stopped.set()

    def _serve(self, writer: Any, reader: Any, layout: Layout) -> None:
        parameters: Arrays = []
        update = b""
        while True:
            message = wire.receive(reader)
            header = message.header
            if message.kind == "stop":
                return
            if message.kind == "refused":
                self.refusals.append(header["reason"])
                continue
            if message.kind == "send":
                wire.send_body(writer, header["task"], blocks(layout), memoryview(update))
                continue
            if message.body is not None:
                parameters = [array.copy() for array in views(layout, bytes(message.body))]
            elif header.get("follows"):
                body = bytearray(layout.nbytes)
                for block in blocks(layout):
                    part = wire.receive(reader)
                    body[block.offset : block.end] = bytes(part.body or b"")
                parameters = [array.copy() for array in views(layout, bytes(body))]
            if message.kind == "evaluate":
                loss, accuracy, count = self._evaluate(parameters, header["round"])
                answer = {
                    "t": "evaluated",
                    "task": header["task"],
                    "loss": loss,
                    "accuracy": accuracy,
                    "num_examples": count,
                }
                wire.send(writer, answer)
                continue
            arrays, num_examples = self._fit(parameters, header["round"])
            own = Layout.of(arrays)
            update = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
            answer = {
                "t": "result",
                "task": header["task"],
                "version": header["version"],
                "num_examples": num_examples,
                "metrics": {},
                "fit_s": 0.0,
                "digest": layout_digest(own),
            }
            if layout_digest(own) != layout_digest(layout):
                answer["layout"] = own.to_header()
            answer = self._change(answer)
            inline = len(update) <= wire.INLINE_BYTES and own == layout
            wire.send(writer, answer, update if inline else None)


@dataclass
class Federation:
    """One aggregator in a thread; `result` waits for its end."""

    location: str
    members: Mapping[str, Member]
    state: Path
    reporter: Reporter
    hub: Hub
    server: Server
    loop: AsynchronousTraining | SynchronousTraining
    outcome: Outcome | None = None
    error: BaseException | None = None
    learners: list[Learner] = field(default_factory=list)
    thread: threading.Thread = field(default_factory=threading.Thread)

    def learner(self, name: str, **behaviour: Any) -> Learner:
        learner = Learner(self.location, name, self.members[name].token, **behaviour)
        self.learners.append(learner)
        return learner

    def exchange(self, name: str) -> tuple[Any, Any, Any, Layout]:
        """A learner's exchange in the test's own hands, after hello and ready.

        Returns:
            Client, writer, reader, and the layout of the model.
        """
        client, writer, reader = connect(self.location, self.members[name].token)
        wire.send(writer, {"t": "hello", "learner": name})
        layout = Layout.from_header(wire.receive(reader).header["layout"])
        wire.send(writer, {"t": "ready", "allows_metrics": False})
        return client, writer, reader, layout

    def result(self, timeout_s: float = 30.0) -> Outcome:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "the aggregator still runs"
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome

    def failure(self, timeout_s: float = 30.0) -> str:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "the aggregator still runs"
        assert isinstance(self.error, FlopsError), f"it did not fail: {self.outcome} {self.error}"
        return str(self.error)

    def reports(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.state / "reports.jsonl").read_text().splitlines()
        return [line["data"] for line in map(json.loads, lines) if line["kind"] == kind]

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = 20.0) -> list[dict[str, Any]]:
        """Wait until the aggregator has reported something."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.reports(kind)) < count:
            assert time.monotonic() < deadline, f"no {kind} within {timeout_s} s"
            assert self.thread.is_alive() or self.reports(kind), f"the aggregator ended: {self.error}"
            threading.Event().wait(0.01)
        return found

    def model(self) -> Arrays:
        """The chosen global model."""
        return read_model(self.state / "model.safetensors")


Start = Callable[..., Federation]


def read_model(path: Path) -> Arrays:
    with path.open("rb") as file:
        layout, offset = read_layout(file.fileno())
        return views(layout, path.read_bytes()[offset:])


def write_model(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start an aggregator for ``learners`` learners named a, b, c, ...; it is stopped at the end."""
    claim_process()
    started: list[Federation] = []

    def _start(
        learners: int = 2,
        arrays: Arrays | None = None,
        state: Path | None = None,
        max_examples: int | None = None,
        members: Mapping[str, Member] | None = None,
        **plan: Any,
    ) -> Federation:
        initial = tmp_path / "initial.safetensors"
        if not initial.exists():
            write_model(initial, arrays if arrays is not None else [np.zeros((3, 2), np.float32)])
        folder = state or tmp_path / f"state-{len(started)}"
        clock = SystemClock()
        checkpoint = Checkpoint(folder, initial)
        reporter = Reporter(folder / "reports.jsonl", None, clock)
        if members is None:
            members = {
                name: Member(f"token-of-{name}", max_examples) for name in "abcdefghijklmnopqrst"[:learners]
            }
        learners = len(members)
        model = checkpoint.model()
        hub = Hub("p-test", model.layout, members)
        model.close()
        location = f"grpc+unix://{tmp_path}/{len(started)}.sock"
        defaults = {
            "min_available_learners": learners,
            "min_fit_learners": learners,
            "min_evaluate_learners": learners,
            "start_deadline_s": 10.0,
        }
        kind = AsynchronousTraining if plan.get("strategy") in ASYNCHRONOUS else SynchronousTraining
        try:
            loop = kind("p-test", Plan(**{**defaults, **plan}), members, hub, checkpoint, reporter, clock)
        except BaseException:
            reporter.close()
            raise
        server = Server(location, hub)
        federation = Federation(location, members, folder, reporter, hub, server, loop)

        def run() -> None:
            try:
                federation.outcome = loop.run()
            except BaseException as error:
                federation.error = error
            finally:
                hub.stop_all("the test's training is over")

        federation.thread = threading.Thread(target=run, name="aggregator", daemon=True)
        federation.thread.start()
        started.append(federation)
        return federation

    yield _start
    for federation in started:
        federation.hub.stop_all("the test is over")
        for learner in federation.learners:
            learner.join()
        federation.thread.join(15)
        federation.server.shutdown()
        federation.loop.close()
        federation.reporter.close()


@dataclass
class RunningCluster:
    """One cluster's aggregator, in threads."""

    name: str
    location: str
    members: Mapping[str, Member]
    state: Path
    hub: Hub
    server: Server
    cluster: Cluster
    reporter: Reporter
    learners: list[Learner] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def learner(self, name: str, **behaviour: Any) -> Learner:
        learner = Learner(self.location, name, self.members[name].token, **behaviour)
        self.learners.append(learner)
        return learner

    def reports(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.state / "reports.jsonl").read_text().splitlines()
        return [line["data"] for line in map(json.loads, lines) if line["kind"] == kind]

    def end(self) -> None:
        self.hub.stop_all("the test is over")
        for learner in self.learners:
            learner.join()
        for thread in self.threads:
            thread.join(15)
        self.server.shutdown()
        self.cluster.close()
        self.reporter.close()


Clusters = Callable[..., RunningCluster]
ONE_OF_EACH = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Clusters]:
    """Start a cluster, by its name among its parent's members and its own learners' slots."""
    started: list[RunningCluster] = []

    def _start(
        parent: Any, name: str, slots: dict[str, int], more: Any = None, **plan: Any
    ) -> RunningCluster:
        members = {learner: Member(f"token-of-{learner}", slot=slot) for learner, slot in slots.items()}
        members |= more or {}
        number = len(started)
        location = f"grpc+unix://{tmp_path}/cluster-{number}.sock"
        state = tmp_path / f"cluster-{name}"
        config = AggregatorConfig(
            project="p-test",
            listen=location,
            members=members,
            initial_model=str(tmp_path / "initial.safetensors"),
            state_dir=str(state),
            plan=Plan(**{**ONE_OF_EACH, "start_deadline_s": 10.0, **plan}),
            parent=Link(parent.location, name, parent.members[name].token),
        )
        checkpoint = Checkpoint(state, Path(config.initial_model))
        clock = SystemClock()
        reporter = Reporter(state / "reports.jsonl", None, clock, name)
        model = checkpoint.model()
        hub = Hub("p-test", model.layout, members)
        model.close()
        one = Cluster(config, hub, checkpoint, reporter, clock)
        running = RunningCluster(name, location, members, state, hub, Server(location, hub), one, reporter)

        def converse() -> None:
            one.conversation.run()
            hub.stop_all("the root has ended")

        running.threads = [threading.Thread(target=target, daemon=True) for target in (one.work, converse)]
        for thread in running.threads:
            thread.start()
        started.append(running)
        return running

    yield _start
    for running in started:
        running.end()


@pytest.fixture(name="read_model")
def read_model_fixture() -> Callable[[Path], Arrays]:
    """Reads the arrays of a model file."""
    return read_model
