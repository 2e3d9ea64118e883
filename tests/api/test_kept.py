"""Answers that are kept: how often they are made, and that none outlives a change."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from flops.api.kept import KeptAnswers, Made
from flops.core.clock import ManualClock
from flops.core.errors import NotFoundError
from flops.manager import Broadcast


class Maker:
    """Counts how often it is asked."""

    def __init__(self, broadcast: Broadcast, clock: ManualClock) -> None:
        self.may_act = True
        self.answers = KeptAnswers(broadcast, lambda: self.may_act, clock)
        self.made = 0
        self.content = b"{}"
        self.lasts = True
        self.during: Callable[[], object] = lambda: None

    def make(self) -> Made:
        content = self.content
        self.made += 1
        self.during()
        return Made(content, self.lasts)

    async def ask(self, subject: str | None = "p-1", asked: str = "project") -> bytes:
        return bytes((await self.answers.answer(subject, asked, self.make)).body)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def broadcast() -> Broadcast:
    return Broadcast()


@pytest.fixture
def maker(broadcast: Broadcast, clock: ManualClock) -> Maker:
    return Maker(broadcast, clock)


def test_an_answer_is_made_once_until_its_project_changes(maker: Maker, broadcast: Broadcast) -> None:
    async def scenario() -> None:
        assert [await maker.ask(), await maker.ask()] == [b"{}", b"{}"]
        broadcast.notify("p-2")
        await maker.ask()
        assert maker.made == 1
        maker.content = b"[]"
        broadcast.notify("p-1")
        assert await maker.ask() == b"[]"
        await maker.ask(asked="events")
        assert maker.made == 3

    asyncio.run(scenario())


def test_an_answer_about_everything_ends_with_any_change(maker: Maker, broadcast: Broadcast) -> None:
    async def scenario() -> None:
        await maker.ask(None)
        broadcast.notify("p-2")
        await maker.ask(None)
        assert maker.made == 2

    asyncio.run(scenario())


def test_a_change_while_an_answer_is_made_is_in_the_next_one(maker: Maker, broadcast: Broadcast) -> None:
    async def scenario() -> None:
        maker.during = lambda: broadcast.notify("p-1")
        await maker.ask()
        maker.during, maker.content = lambda: None, b"[]"
        assert await maker.ask() == b"[]"

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["does not last", "is large"])
def test_what_does_not_last_or_is_large_is_made_each_time(maker: Maker, what: str) -> None:
    if what == "is large":
        maker.content = b" " * (64 << 10) + b"{}"
    else:
        maker.lasts = False

    async def scenario() -> None:
        await maker.ask()
        await maker.ask()
        assert maker.made == 2

    asyncio.run(scenario())


def test_no_answer_is_kept_for_long(maker: Maker, clock: ManualClock) -> None:
    async def scenario() -> None:
        await maker.ask()
        clock.advance(60)
        await maker.ask()
        assert maker.made == 2

    asyncio.run(scenario())


def test_a_manager_that_another_one_may_have_replaced_tells_nothing_from_memory(maker: Maker) -> None:
    async def scenario() -> None:
        await maker.ask()
        maker.may_act = False
        await maker.ask()
        assert maker.made == 2

    asyncio.run(scenario())


def test_those_who_ask_at_the_same_time_share_an_answer(maker: Maker) -> None:
    go_on = threading.Event()
    maker.during = lambda: go_on.wait(10)
    maker.lasts = False

    async def scenario() -> None:
        asking = [asyncio.create_task(maker.ask()) for _ in range(5)]
        while not maker.made:
            await asyncio.sleep(0)
        asking[0].cancel()  # whoever came first goes: the others get their answer all the same
        await asyncio.sleep(0)
        go_on.set()
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError)
        assert ended[1:] == [b"{}"] * 4
        assert maker.made == 1

    asyncio.run(scenario())


def test_an_error_is_told_to_all_and_not_kept(maker: Maker) -> None:
    def refuse() -> None:
        raise NotFoundError("there is no such project")

    maker.during = refuse

    async def scenario() -> None:
        ended = await asyncio.gather(*(maker.ask() for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in ended] == [NotFoundError] * 3
        maker.during = lambda: None
        assert await maker.ask() == b"{}"

    asyncio.run(scenario())
