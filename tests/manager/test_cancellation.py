import threading

import pytest

from flops.manager.cancellation import Cancellation, Cancelled, Places


def test_a_callback_runs_when_the_flag_is_set_and_not_after_its_block() -> None:
    cancellation = Cancellation()
    calls: list[str] = []
    with cancellation.calling(lambda: calls.append("inside")):
        cancellation.cancel()
    with cancellation.calling(lambda: calls.append("set already")):
        pass
    assert calls == ["inside", "set already"]
    with pytest.raises(Cancelled):
        cancellation.check()


def test_who_waits_for_a_place_is_woken_by_its_cancellation() -> None:
    places, cancellation = Places(1), Cancellation()
    outcome: list[str] = []

    def wait() -> None:
        try:
            with places.take(cancellation):
                outcome.append("in")
        except Cancelled:
            outcome.append("cancelled")

    with places.take(Cancellation()):
        thread = threading.Thread(target=wait)
        thread.start()
        cancellation.cancel()
        thread.join(10)
    assert outcome == ["cancelled"]
    with places.take(Cancellation()):
        pass
