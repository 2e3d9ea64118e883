"""Requests under an Idempotency-Key, on a real database."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, InvalidInputError
from flops.core.ids import ProjectId
from flops.manager.once import KEPT_S, Once, OnceRequest
from flops.persistence import open_database

REQUEST = OnceRequest("anna", "k-1", "POST /v1/projects", {"spec": {"repo": "/r"}})


class Work:
    """Notes every time it is done."""

    def __init__(self) -> None:
        self.projects: list[ProjectId] = []

    def __call__(self, project: ProjectId) -> dict[str, Any]:
        self.projects.append(project)
        return {"id": project, "nth": len(self.projects)}


@pytest.fixture
def once(database: Path | str, clock: ManualClock) -> Iterator[Once]:
    engine = open_database(database)
    yield Once(engine, clock)
    engine.dispose()


def test_the_same_request_again_gets_the_same_answer_and_is_not_carried_out(once: Once) -> None:
    work = Work()
    answer, repeated = once.answer(REQUEST, work)
    assert (answer["nth"], repeated) == (1, False)
    assert once.answer(REQUEST, work) == (answer, True)
    assert len(work.projects) == 1


@pytest.mark.parametrize("other", [{"body": {"spec": {"repo": "/s"}}}, {"operation": "POST /v1/data/mock"}])
def test_the_same_key_with_another_request_is_refused(once: Once, other: dict[str, Any]) -> None:
    once.answer(REQUEST, Work())
    with pytest.raises(ConflictError, match="Idempotency-Key 'k-1' came with another request before"):
        once.answer(replace(REQUEST, **other), Work())


def test_keys_of_different_users_never_meet_and_none_is_no_key(once: Once) -> None:
    work = Work()
    for request in (REQUEST, replace(REQUEST, caller="bert"), *[replace(REQUEST, key=None)] * 2):
        assert once.answer(request, work)[1] is False
    assert len(set(work.projects)) == 4


def test_what_was_refused_may_be_sent_again_corrected(once: Once) -> None:
    def refuse(_: ProjectId) -> dict[str, Any]:
        raise InvalidInputError("no")

    with pytest.raises(InvalidInputError):
        once.answer(REQUEST, refuse)
    assert once.answer(replace(REQUEST, body={}), Work())[1] is False


def test_a_request_that_a_kill_cut_off_is_carried_out_again_under_the_same_project(once: Once) -> None:
    class Killed(BaseException):
        """kill -9 of the manager."""

    work = Work()

    def die(project: ProjectId) -> dict[str, Any]:
        work(project)
        raise Killed

    with pytest.raises(Killed):
        once.answer(REQUEST, die)
    with pytest.raises(
        ConflictError, match="was cut off when the manager ended, and may have been carried out"
    ):
        once.answer(replace(REQUEST, harmless=False), work)
    answer, repeated = once.answer(REQUEST, work)
    assert (answer["nth"], repeated) == (2, False)
    assert work.projects[0] == work.projects[1]


def test_a_key_is_forgotten_after_a_day(once: Once, clock: ManualClock) -> None:
    work = Work()
    once.answer(REQUEST, work)
    clock.advance(KEPT_S - 1)
    assert once.answer(REQUEST, work)[1] is True
    clock.advance(2)
    assert once.answer(REQUEST, work)[1] is False


def test_requests_with_one_key_at_the_same_time_are_carried_out_once(once: Once) -> None:
    work = Work()
    threads = [threading.Thread(target=once.answer, args=(REQUEST, work)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(work.projects) == 1
