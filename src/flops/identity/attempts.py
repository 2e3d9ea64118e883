"""Limits against guessing tokens and against too many requests; in memory, and bounded there."""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass

from flops.core.clock import Clock
from flops.core.errors import TooManyRequestsError

_KNOWN = 10_000
"""So many addresses or tokens are remembered, those that were seen last."""


@dataclass
class _Failures:
    count: int = 0
    locked_until: float = 0.0
    last: float = 0.0


class Attempts:
    """Lock-out: after some failures whoever caused them has to wait, longer with each further one.

    Args:
        free: failures that cost nothing.
        first_s, longest_s: the wait doubles from one to the other.
        forgotten_s: after so long without any failure they are forgotten.
        what: fails, in words.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        free: int = 10,
        first_s: float = 1.0,
        longest_s: float = 900.0,
        forgotten_s: float = 3600.0,
        what: str = "wrong tokens",
    ) -> None:
        self._clock = clock
        self._free, self._first_s, self._longest_s = free, first_s, longest_s
        self._forgotten_s = forgotten_s
        self._what = what
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Failures] = OrderedDict()

    def check(self, who: str) -> None:
        """Raises: TooManyRequestsError: they have to wait."""
        with self._lock:
            known = self._known.get(who)
            left = known.locked_until - self._clock.monotonic() if known is not None else 0.0
        if left > 0:
            raise TooManyRequestsError(
                f"too many {self._what} came from {who} - try again in {math.ceil(left)} s",
                retry_after_s=left,
            )

    def failed(self, who: str) -> None:
        now = self._clock.monotonic()
        with self._lock:
            known = self._known.setdefault(who, _Failures())
            if now - known.last > self._forgotten_s:
                known.count = 0
            known.count += 1
            known.last = now
            if (over := known.count - self._free) >= 0:
                known.locked_until = now + min(self._longest_s, self._first_s * 2.0 ** min(over, 30))
            self._known.move_to_end(who)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)

    def succeeded(self, who: str) -> None:
        with self._lock:
            self._known.pop(who, None)


class RateLimit:
    """A bucket for each caller, filling with time: ``burst`` requests at once, ``per_s`` in the long run."""

    def __init__(self, clock: Clock, *, per_s: float, burst: int) -> None:
        self._clock = clock
        self._per_s, self._burst = per_s, float(burst)
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Raises: TooManyRequestsError: the bucket is empty."""
        now = self._clock.monotonic()
        with self._lock:
            level, since = self._buckets.pop(caller, (self._burst, now))
            level = min(self._burst, level + (now - since) * self._per_s)
            enough = level >= 1.0
            self._buckets[caller] = (level - 1.0 if enough else level, now)
            while len(self._buckets) > _KNOWN:
                self._buckets.popitem(last=False)
        if not enough:
            wait_s = (1.0 - level) / self._per_s
            raise TooManyRequestsError(
                f"more than {self._per_s:g} requests a second - try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
