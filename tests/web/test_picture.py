"""What events add up to."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from flops.web.picture import Picture
from flops.web.told import tell
from tests.web.fake_api import HOSTILE, events, finished


def picture_of(told: list[dict[str, Any]]) -> Picture:
    picture = Picture()
    for event in told:
        picture.apply(event)
    return picture


def in_order(*told: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"project": "p", "seq": seq, "time": float(seq), "kind": kind, "data": data}
        for seq, (kind, data) in enumerate(told, start=1)
    ]


def test_events_add_up_to_rounds_members_and_bytes() -> None:
    picture = picture_of(events())
    assert [done.number for done in picture.rounds] == [1, 2]
    assert picture.bytes_down == 4000
    assert picture.members["scans-1"].took_part == 2
    assert picture.members["scans-2"].left_out == 2
    assert picture.members["scans-2"].refused == 1
    assert picture.steps["scans"].duration_s == 1.5


@given(st.lists(st.integers(0, 13)))
def test_events_that_come_again_or_late_change_nothing(again: list[int]) -> None:
    told = events()
    picture = picture_of(told)
    for index in again:
        picture.apply(told[index])
    assert picture.rounds == picture_of(told).rounds
    assert len(picture.events) == len(told)


def test_a_round_that_was_lost_and_done_again_counts_once() -> None:
    picture = picture_of(in_order(finished(1, 0.9), finished(2, 0.8), finished(2, 0.7), finished(3, 0.6)))
    assert [(done.number, done.metrics["loss"]) for done in picture.rounds] == [(1, 0.9), (2, 0.7), (3, 0.6)]


def test_stages_tell_where_a_project_failed() -> None:
    states = ("submitted", "preparing", "failed")
    picture = picture_of(in_order(*(("project.state", {"state": one}) for one in states)))
    assert [one["state"] for one in picture.stages(now=10.0)][:3] == ["done", "failed", "pending"]


def test_a_project_of_which_nothing_was_told_yet_has_stages() -> None:
    assert [one["state"] for one in Picture().stages(now=1.0)] == ["current", *["pending"] * 5]


def test_stages_of_a_finished_project_are_all_done_and_their_times_add_up() -> None:
    states = ("submitted", "preparing", "deploying", "training", "packaging", "finished")
    picture = picture_of(in_order(*(("project.state", {"state": one}) for one in states)))
    stages = picture.stages(now=100.0)
    assert {one["state"] for one in stages} == {"done"}
    assert sum(one["spent_s"] or 0 for one in stages) == picture.took_s == 5.0


def test_rests_do_not_count_into_what_a_project_took() -> None:
    states = ("submitted", "training", "paused", "training", "finished")
    told = in_order(*(("project.state", {"state": one}) for one in states))
    told[3]["time"], told[4]["time"] = 1000.0, 1001.0
    assert picture_of(told).took_s == 3.0


def test_every_kind_of_event_reads_as_a_short_sentence() -> None:
    for event in events(HOSTILE * 100):
        told = tell(event, "round")
        assert told.text
        assert len(told.text) <= 600
        assert "\x1b" not in told.text


def test_a_long_life_keeps_a_bounded_list_of_events() -> None:
    picture = picture_of(in_order(*(("warning", {"message": "x"}) for _ in range(5000))))
    assert len(picture.events) == 2000
    assert len(picture.warnings) <= 20


def test_viewers_at_once_count_an_event_once() -> None:
    told = events()

    class Slow:
        async def get(self, *_: str, after: int, limit: int) -> Any:
            await asyncio.sleep(0.001)
            return {"events": [one for one in told if one["seq"] > after][:limit]}

    async def work() -> Picture:
        picture = Picture()
        await asyncio.gather(*(picture.refresh(Slow(), "p") for _ in range(10)))  # type: ignore[arg-type]
        return picture

    assert asyncio.run(work()).bytes_down == 4000
