import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.telemetry import about, current, current_request, is_request, new_request, request_of, trace_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_facts_hold_inside_and_are_forgotten_outside() -> None:
    before = current()
    with about(project="p-abcd", round=3):
        with about(round=4, learner="", request=None):
            assert current() == {**before, "project": "p-abcd", "round": 4}
        assert current()["round"] == 3
    assert current() == before


def test_threads_do_not_share_facts() -> None:
    seen: list[str] = []
    with about(request="mine"):
        thread = threading.Thread(target=lambda: seen.append(current_request()))
        thread.start()
        thread.join()
        assert current_request() == "mine"
    assert seen == [""]


def test_a_request_keeps_its_own_id_else_that_of_its_trace_else_gets_a_new_one() -> None:
    assert request_of("deploy-7.3_x", PARENT) == "deploy-7.3_x"
    assert request_of(None, PARENT) == TRACE
    made = request_of(None, None)
    assert (len(made), int(made, 16) > 0) == (32, True)
    assert made != request_of(None, None)


@pytest.mark.parametrize("text", ["", "a b", "-a", "a\n", "a/../b", "x" * 65, "ü", '{"time"', "a\x00", "a:b"])
def test_what_cannot_be_an_id_counts_as_not_sent(text: str) -> None:
    assert not is_request(text)
    assert request_of(text, PARENT) == TRACE


@pytest.mark.parametrize(
    "text",
    [
        "",
        TRACE,
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        PARENT + "\n",
        PARENT + "-" + "x" * 500,
    ],
)
def test_what_is_no_traceparent_is_no_trace(text: str) -> None:
    assert trace_of(text) is None


@given(st.text(), st.text())
def test_whatever_the_headers_say_the_id_is_one(request_id: str, traceparent: str) -> None:
    assert is_request(request_of(request_id, traceparent))


def test_new_ids_are_trace_ids() -> None:
    made = new_request()
    assert trace_of(f"00-{made}-00f067aa0ba902b7-01") == made
