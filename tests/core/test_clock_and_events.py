import json

from flops.core.clock import ManualClock, SystemClock
from flops.core.events import Event, EventKind


def test_manual_clock_moves_only_when_told() -> None:
    clock = ManualClock(100.0)
    assert (clock.now(), clock.now()) == (100.0, 100.0)
    clock.advance(2.5)
    assert (clock.now(), clock.monotonic()) == (102.5, 102.5)


def test_system_clock_never_runs_back() -> None:
    clock = SystemClock()
    first = clock.monotonic()
    assert clock.monotonic() >= first
    assert clock.now() > 1_600_000_000


def test_an_event_is_plain_json_with_its_kind_as_text() -> None:
    event = Event("p-7k2mqd", 4, 12.5, EventKind.ROUND_STARTED, {"round": 1, "cohort": ["a"]})
    assert json.loads(json.dumps(event.to_json())) == {
        "project": "p-7k2mqd",
        "seq": 4,
        "time": 12.5,
        "kind": "round.started",
        "data": {"round": 1, "cohort": ["a"]},
    }
