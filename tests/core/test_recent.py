"""What is kept, and for which version."""

from flops.core.clock import ManualClock
from flops.core.recent import Recent


def make(clock: ManualClock, most: int = 10) -> Recent[str, str]:
    return Recent(clock, kept_s=5.0, most=most)


def test_a_value_is_given_for_its_own_version_alone() -> None:
    recent = make(ManualClock())
    assert recent.get("a", 1) is None
    recent.keep("a", "one", 1)
    assert (recent.get("a", 1), recent.get("a", 2), recent.get("b", 1)) == ("one", None, None)
    recent.keep("a", "two", 2)
    assert (recent.get("a", 1), recent.get("a", 2)) == (None, "two")


def test_what_changed_during_a_look_up_is_looked_up_again() -> None:
    recent, version = make(ManualClock()), 1
    seen, version = version, 2  # asked for, and then it changes
    recent.keep("a", "of before", seen)
    assert recent.get("a", version) is None


def test_a_value_is_not_kept_for_ever() -> None:
    clock = ManualClock()
    recent = make(clock)
    recent.keep("a", "one")
    clock.advance(4.9)
    assert recent.get("a") == "one"
    clock.advance(0.1)
    assert recent.get("a") is None


def test_those_that_were_used_last_are_kept() -> None:
    recent = make(ManualClock(), most=2)
    recent.keep("a", "one")
    recent.keep("b", "two")
    recent.get("a")
    recent.keep("c", "three")
    assert [recent.get(key) for key in "abc"] == ["one", None, "three"]


def test_as_much_is_kept_as_was_said() -> None:
    recent: Recent[str, bytes] = Recent(ManualClock(), kept_s=5.0, most=10, size=len)
    for key in "abc":
        recent.keep(key, b"1234")
    assert [recent.get(key) for key in "abc"] == [None, b"1234", b"1234"]
    recent.keep("b", b"12")  # in its place
    recent.keep("d", b"1234")
    assert [recent.get(key) for key in "bcd"] == [b"12", b"1234", b"1234"]
    recent.keep("e", b"12345678901")  # more than all
    assert [recent.get(key) for key in "bcde"] == [None] * 4
