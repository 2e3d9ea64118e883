"""Learners that break the protocol on purpose: it costs them their session, and nobody else anything."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.federation import Member, wire
from flops.federation.collect import Collection, EvaluateCollection, TrainCollection
from flops.federation.hub import GlobalModel, Hub, Said, Session
from flops.federation.intake import PARALLEL_UPLOADS, finite_metrics
from flops.federation.model_file import layout_digest
from flops.federation.updates import RefusedError, Spool
from flops_worker.tensors import Layout

Start = Any
ONE = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}
LARGE = Layout.of([np.zeros(50_000, np.float32)])


class Exchange:
    """The aggregator's end of an exchange as the hub sees it, in memory: what was written, and a gate."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.changed = threading.Event()

    def begin(self, schema: Any) -> None:
        assert schema == wire.SCHEMA

    def write_metadata(self, metadata: bytes) -> None:
        assert self.gate.wait(20)
        self.written.append(json.loads(metadata))
        self.changed.set()

    def write_with_metadata(self, batch: Any, metadata: bytes) -> None:
        self.write_metadata(metadata)

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.written) < count:
            self.changed.clear()
            assert time.monotonic() < deadline
            self.changed.wait(0.05)


@pytest.fixture
def session() -> Iterator[tuple[Session, Exchange]]:
    exchange = Exchange()
    one = Session("a", exchange)
    yield one, exchange
    exchange.gate.set()
    one.close()
    one.join(5)


def _model(version: int) -> GlobalModel:
    return GlobalModel(version, version, memoryview(bytes(8)), ())


def test_a_learner_that_does_not_read_keeps_only_its_latest_task_waiting(
    session: tuple[Session, Exchange],
) -> None:
    one, exchange = session
    exchange.gate.clear()
    for number in range(1000):
        one.send({"t": "train", "task": f"train-{number}"}, _model(number))
    one.close()
    exchange.gate.set()
    one.join(5)
    tasks = [header["task"] for header in exchange.written]
    assert tasks[-1] == "train-999"
    assert len(tasks) <= 2


def test_a_session_is_asked_each_task_once(session: tuple[Session, Exchange]) -> None:
    one, exchange = session
    assert one.send({"t": "train", "task": "train-1"}, _model(0))
    assert not one.send({"t": "train", "task": "train-1"}, _model(0))
    one.close()
    one.join(5)
    assert len(exchange.written) == 1


@pytest.mark.parametrize("kind", ["ready", "failed", "result", "evaluated", "body"])
def test_a_learner_may_say_only_as_much_as_it_was_asked(session: tuple[Session, Exchange], kind: str) -> None:
    one, exchange = session
    hub = Hub("p-test", LARGE, {"a": Member("t")})
    one.send({"t": "train", "task": "train-1"}, _model(0))
    exchange.wait_for(1)
    message = wire.Received({"t": kind, "task": "train-1"}, None)
    if kind != "body":
        hub.dispatch(one, message)
    with pytest.raises(wire.WireError):
        hub.dispatch(one, message)


@pytest.mark.parametrize("depth", [100_000, 5_000_000])
def test_a_deep_header_is_a_broken_header(depth: int) -> None:
    with pytest.raises(wire.WireError):
        wire.parse(pa.py_buffer(b'{"a":' * 2 + b"[" * depth), None)


def test_a_header_beyond_its_limit_is_not_even_parsed() -> None:
    with pytest.raises(wire.WireError, match="too large"):
        wire.parse(pa.py_buffer(b'{"t":"ready"}' + b" " * 100), None, max_header_bytes=100)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**310)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "0", "t", "task", "loss"])
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
layouts = st.dictionaries(
    st.text(max_size=3),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "I64", "X"]) | json_values,
            "shape": st.lists(st.integers(-2, 1 << 60), max_size=40) | json_values,
            "data_offsets": st.lists(st.integers(-2, 1 << 60), max_size=3) | json_values,
        }
    ),
    max_size=3,
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "t": st.sampled_from(["hello", "ready", "result", "evaluated", "failed", "body", "beat"])
        | json_values,
        "task": st.just("train-1") | json_values,
        "num_examples": st.integers(1, 9) | json_values,
        "digest": st.just(layout_digest(LARGE)) | json_values,
        "layout": layouts | json_values,
        "metrics": json_values,
        "fit_s": json_values,
        "loss": json_values,
        "accuracy": json_values,
        "offset": json_values,
        "allows_metrics": json_values,
    },
)


class _Post:
    """A collection's way to learners that are not connected."""

    def send(self, learner: str, header: dict[str, Any]) -> bool:
        return False

    def begin_upload(self, learner: str, task: str, body: Any) -> bool:
        return False

    def end_upload(self, learner: str) -> None:
        pass


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    one = Spool(tmp_path_factory.mktemp("spool"))
    yield one
    one.close()


def _collection(spool: Spool, post: Any = None, cohort: str = "a", **more: Any) -> TrainCollection:
    return TrainCollection(
        "train-1",
        list(cohort),
        version=0,
        layout=LARGE,
        layouts={},
        spool=spool,
        post=post or _Post(),
        max_examples={},
        take=more.get("take", lambda update: update.body.release()),
    )


@settings(max_examples=300, deadline=None)
@given(header=headers, body=st.none() | st.binary(max_size=40))
def test_no_header_raises_anything_but_a_refusal(
    spool: Spool, header: dict[str, Any], body: bytes | None
) -> None:
    """Whatever JSON a learner sends: dispatch and collections answer with their own errors or not at all."""
    try:
        message = wire.parse(pa.py_buffer(json.dumps(header).encode()), None)
    except wire.WireError:
        return
    message = wire.Received(message.header, memoryview(body) if body is not None else None)
    exchange = Exchange()
    session = Session("a", exchange)
    try:
        session.send({"t": "train", "task": "train-1"}, _model(0))
        exchange.wait_for(1)
        hub = Hub("p-test", LARGE, {"a": Member("t")})
        hub.dispatch(session, message)
    except wire.WireError:
        pass
    finally:
        session.close()
        session.join(5)
    collections: list[TrainCollection | EvaluateCollection] = [
        _collection(spool),
        EvaluateCollection("train-1", ["a"], {}),
    ]
    for collection in collections:
        try:
            collection.answer(Said("a", "result", message.header, body))
        except RefusedError as error:
            str(error).encode(errors="replace")
        assert isinstance(collection, Collection)
    json.dumps(finite_metrics(header.get("metrics")), allow_nan=False)


@given(st.binary(max_size=200))
def test_no_bytes_in_place_of_a_header_raise_anything_but_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        wire.parse(pa.py_buffer(data), None)


def test_a_body_of_another_schema_is_a_wire_error() -> None:
    batch = pa.record_batch({"body": pa.array([1.0, 2.0])})
    with pytest.raises(wire.WireError, match="one column of bytes"):
        wire.parse(pa.py_buffer(b"{}"), batch)


def test_an_update_that_is_announced_twice_is_asked_for_once(spool: Spool) -> None:
    asked: list[str] = []

    class Post(_Post):
        def begin_upload(self, learner: str, task: str, body: Any) -> bool:
            asked.append(learner)
            return True

    collection = _collection(spool, Post(), "ab")
    header = {"task": "train-1", "version": 0, "num_examples": 1, "digest": layout_digest(LARGE)}
    collection.answer(Said("a", "result", header))
    for _ in range(10):
        with pytest.raises(RefusedError, match="it has answered train-1 already"):
            collection.answer(Said("a", "result", header))
    assert asked == ["a"]
    assert collection.outstanding == {"a", "b"}
    collection.close()


def test_learners_that_drip_their_updates_do_not_keep_others_from_uploading(spool: Spool) -> None:
    asked: list[str] = []

    class Post(_Post):
        def begin_upload(self, learner: str, task: str, body: Any) -> bool:
            asked.append(learner)
            return True

    collection = _collection(spool, Post(), "abcdef")
    for learner in "abcdef":
        header = {"task": "train-1", "version": 0, "num_examples": 1, "digest": layout_digest(LARGE)}
        collection.answer(Said(learner, "result", header))
    assert len(asked) == PARALLEL_UPLOADS
    look_again = collection.hand_slots_on(100.0)
    assert 100.0 < look_again < 120.0
    assert len(asked) == PARALLEL_UPLOADS
    collection.hand_slots_on(look_again)
    assert asked == list("abcdef")
    collection.close()


def _huge(header: dict[str, Any]) -> dict[str, Any]:
    return {**header, "metrics": {"x": 10**400, "y": 1.0}, "fit_s": 10**400}


def test_integers_that_are_no_float_do_not_end_the_training(start: Start) -> None:
    federation = start(learners=2, rounds=1, **ONE)
    federation.learner("a", change=_huge, evaluate=lambda parameters, _: (10**400, 0.5, 5))
    federation.learner("b")
    federation.result()
    (data,) = federation.reports("round.finished")
    assert data["train_metrics"] == {"y": 1.0}
    assert data["left_out"] == {"a": f"its loss is {str(10**400)[:40]}"}


def test_a_layout_whose_dtype_is_a_list_is_refused(start: Start) -> None:
    layout = {"0": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}
    federation = start(learners=2, rounds=1, **ONE)
    federation.learner("a", change=lambda header: {**header, "digest": "x", "layout": layout})
    federation.learner("b")
    federation.result()
    assert federation.reports("update.refused")[0]["reason"].startswith("its description of the parameters")


class Call:
    """A call as the hub sees it: the messages of a learner, then silence until `end`."""

    def __init__(self, hub: Hub, learner: str, *messages: dict[str, Any]) -> None:
        self.exchange = Exchange()
        self.end = threading.Event()
        self.error: BaseException | None = None
        self._messages = list(messages)
        self._hub, self._learner = hub, learner
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def read_chunk(self) -> Any:
        from types import SimpleNamespace

        if self._messages:
            metadata = pa.py_buffer(json.dumps(self._messages.pop(0)).encode())
            return SimpleNamespace(app_metadata=metadata, data=None)
        assert self.end.wait(20)
        raise StopIteration

    def _run(self) -> None:
        try:
            self._hub.serve(self._learner, self, self.exchange)
        except BaseException as error:
            self.error = error


HELLO, READY = {"t": "hello", "learner": "a"}, {"t": "ready"}


def _said(hub: Hub, count: int) -> list[str]:
    return [hub.inbox.get(timeout=10).kind for _ in range(count)]


def test_a_call_does_not_end_while_a_message_is_being_written() -> None:
    """It would crash the aggregator: the server would write to memory that went with the call."""
    hub = Hub("p-test", LARGE, {"a": Member("t")})
    call = Call(hub, "a", HELLO, READY)
    assert _said(hub, 1) == ["ready"]
    call.exchange.wait_for(1)
    call.exchange.gate.clear()
    hub.send("a", {"t": "refused"})
    call.end.set()  # the learner says no more, and does not read
    assert _said(hub, 1) == ["gone"]
    call.thread.join(1.5)
    assert call.thread.is_alive()
    call.exchange.gate.set()  # its connection ends
    call.thread.join(5)
    assert not call.thread.is_alive()


def test_a_former_session_has_no_say_and_its_agent_is_told_to_end() -> None:
    hub = Hub("p-test", LARGE, {"a": Member("t")})
    first = Call(hub, "a", HELLO, READY)
    assert _said(hub, 1) == ["ready"]
    first.exchange.wait_for(1)  # a last word is said alone, without what still waits to be sent
    former = hub.session("a")
    assert former is not None
    second = Call(hub, "a", HELLO, READY)
    assert _said(hub, 2) == ["gone", "ready"]
    first.exchange.wait_for(2)
    assert first.exchange.written[1]["t"] == "stop"
    hub.dispatch(former, wire.Received({"t": "failed"}, None))
    first.end.set()
    first.thread.join(5)
    assert hub.inbox.empty()
    assert hub.ready() == ["a"]
    second.end.set()
    second.thread.join(5)
    assert _said(hub, 1) == ["gone"]


def test_a_learner_that_comes_when_all_is_over_is_told_so() -> None:
    hub = Hub("p-test", LARGE, {"a": Member("t")})
    hub.stop_all("it is over")
    call = Call(hub, "a", HELLO)
    call.thread.join(5)
    assert call.exchange.written == [{"t": "stop", "reason": "it is over"}]
    assert hub.inbox.empty()


def test_stopping_does_not_wait_for_each_learner_that_does_not_read() -> None:
    names = [f"l-{number}" for number in range(12)]
    hub = Hub("p-test", LARGE, {name: Member(name) for name in names})
    calls = [Call(hub, name, {**HELLO, "learner": name}, READY) for name in names]
    _said(hub, 12)
    for call in calls:
        call.exchange.wait_for(1)
        call.exchange.gate.clear()
    start = time.monotonic()
    hub.stop_all("it is over")
    assert time.monotonic() - start < 4
    for call in calls:
        call.exchange.gate.set()
        call.end.set()
        call.thread.join(5)


def test_open_exchanges_of_one_learner_are_bounded() -> None:
    import pyarrow.flight as flight

    hub = Hub("p-test", LARGE, {"a": Member("t")})
    calls = [Call(hub, "a", HELLO) for _ in range(16)]
    for call in calls:
        call.exchange.wait_for(1)
    one_more = Call(hub, "a", HELLO)
    one_more.thread.join(5)
    assert isinstance(one_more.error, flight.FlightUnavailableError)
    for call in calls:
        call.end.set()
        call.thread.join(5)
    again = Call(hub, "a", HELLO)
    again.exchange.wait_for(1)
    again.end.set()
    again.thread.join(5)


def test_the_folder_of_spool_files_looks_empty(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    fds = [spool.take() for _ in range(6)]
    assert list(tmp_path.iterdir()) == []
    for fd in fds:
        spool.give_back(fd)
    assert len(spool._free) == 4
    spool.close()
