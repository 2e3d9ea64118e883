"""Lock-out and rate limits."""

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import TooManyRequestsError
from flops.identity import Attempts, RateLimit
from flops.identity import attempts as limits


def test_failures_lock_out_for_longer_and_longer_and_a_success_ends_it() -> None:
    clock = ManualClock()
    attempts = Attempts(clock, free=3, first_s=1.0, longest_s=10.0)
    waits = []
    for _ in range(2):
        attempts.failed("a")
        attempts.check("a")
    for _ in range(6):
        attempts.failed("a")
        with pytest.raises(TooManyRequestsError) as refused:
            attempts.check("a")
        waits.append(refused.value.retry_after_s)
        attempts.check("b")
        clock.advance(waits[-1])
        attempts.check("a")
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    attempts.succeeded("a")
    attempts.failed("a")
    attempts.check("a")


def test_failures_of_long_ago_are_forgotten() -> None:
    clock = ManualClock()
    attempts = Attempts(clock, free=2, forgotten_s=100)
    attempts.failed("a")
    clock.advance(101)
    attempts.failed("a")
    attempts.check("a")


def test_a_bucket_empties_and_fills() -> None:
    clock = ManualClock()
    limit = RateLimit(clock, per_s=2.0, burst=3)
    for _ in range(3):
        limit.take("a")
    with pytest.raises(TooManyRequestsError, match="more than 2 requests a second") as refused:
        limit.take("a")
    assert refused.value.retry_after_s == pytest.approx(0.5)
    limit.take("b")
    clock.advance(0.5)
    limit.take("a")
    with pytest.raises(TooManyRequestsError):
        limit.take("a")
    clock.advance(1000)
    for _ in range(3):
        limit.take("a")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_KNOWN", 10)
    clock = ManualClock()
    attempts, limit = Attempts(clock, free=1), RateLimit(clock, per_s=1, burst=1)
    for number in range(50):
        attempts.failed(str(number))
        limit.take(str(number))
    assert len(attempts._known) == len(limit._buckets) == 10
