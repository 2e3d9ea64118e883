"""The chain of the audit log, and what becomes visible when somebody changes it."""

import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.core.errors import InvalidInputError
from flops.identity import AuditLog

COUNT = 12


@pytest.fixture
def filled(audit: AuditLog, clock: ManualClock) -> AuditLog:
    for number in range(COUNT):
        clock.advance(0.1)
        audit.append(
            user="ann",
            token="0123456789ab",
            address="127.0.0.1",
            action="POST /v1/projects",
            object=f"project p-{number}",
            outcome=201,
            detail={"größe": number / 3},
        )
    return audit


def change(engine: sa.Engine, statement: str) -> None:
    """What somebody does who has the database file, and switches off what stands in the way."""
    with engine.execution_options(writes=True).begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("DROP TRIGGER audit_UPDATE_refused")
            connection.exec_driver_sql("DROP TRIGGER audit_DELETE_refused")
        else:
            connection.exec_driver_sql("DROP TRIGGER audit_refused ON audit")
        connection.exec_driver_sql(statement)


def test_an_untouched_log_is_whole(filled: AuditLog) -> None:
    found = filled.verify()
    assert (found.entries, found.broken_at, found.reason) == (COUNT, None, None)
    assert found.head == f"{COUNT}:{filled.entries()[-1].hash}"
    assert filled.verify(found.head).broken_at is None


def test_an_empty_log_is_whole(audit: AuditLog) -> None:
    assert audit.verify().head == "0:" + "0" * 64


@pytest.mark.parametrize("statement", ["UPDATE audit SET outcome = 200", "DELETE FROM audit"])
def test_the_database_refuses_changes(filled: AuditLog, engine: sa.Engine, statement: str) -> None:
    with (
        pytest.raises(sa.exc.DBAPIError, match="the audit log only grows"),
        engine.execution_options(writes=True).begin() as connection,
    ):
        connection.exec_driver_sql(statement)
    assert filled.verify().broken_at is None


@pytest.mark.parametrize(
    ("statement", "broken_at", "reason"),
    [
        ("UPDATE audit SET \"user\" = 'bob' WHERE seq = 5", 5, "entry 5 is not what was written"),
        ("UPDATE audit SET detail = '{}' WHERE seq = 1", 1, "entry 1 is not what was written"),
        ("UPDATE audit SET time = time + 0.001 WHERE seq = 12", 12, "entry 12 is not what was written"),
        ("UPDATE audit SET hash = '0' WHERE seq = 3", 3, "entry 3 is not what was written"),
        ("DELETE FROM audit WHERE seq = 7", 7, "entry 7 is missing"),
        ("DELETE FROM audit WHERE seq = 1", 1, "entry 1 is missing"),
    ],
)
def test_a_changed_log_is_seen(
    filled: AuditLog, engine: sa.Engine, statement: str, broken_at: int, reason: str
) -> None:
    change(engine, statement)
    found = filled.verify()
    assert (found.broken_at, found.reason) == (broken_at, reason)


def test_a_log_whose_end_was_cut_off_is_seen_by_whoever_noted_the_head(
    filled: AuditLog, engine: sa.Engine
) -> None:
    head = filled.verify().head
    change(engine, "DELETE FROM audit WHERE seq > 10")
    assert filled.verify().broken_at is None
    found = filled.verify(head)
    assert (found.broken_at, found.reason) == (11, "entries 11 to 12 are missing")


def test_a_log_that_was_written_anew_is_seen_by_whoever_noted_the_head(
    filled: AuditLog, engine: sa.Engine
) -> None:
    head = filled.verify().head
    change(engine, "DELETE FROM audit")
    for _ in range(COUNT + 1):
        filled.append(user="bob", token="", address="", action="a", object="o", outcome=200)
    assert filled.verify().broken_at is None
    assert filled.verify(head).reason == f"entry {COUNT} is not the one that was noted"


@pytest.mark.parametrize("head", ["", "12", "12:abc", "x:" + "0" * 64, "-1:" + "0" * 64])
def test_what_is_no_head_is_refused(audit: AuditLog, head: str) -> None:
    with pytest.raises(InvalidInputError, match="no head of the audit log"):
        audit.verify(head)


def test_many_writers_make_one_chain(audit: AuditLog) -> None:
    def write(number: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(10):
                audit.append(user=f"u{number}", token="", address="", action="a", object="o", outcome=200)

        return work

    threads = [threading.Thread(target=write(number)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert audit.verify().entries == 60
    assert audit.verify().broken_at is None


def test_pages_and_filters(filled: AuditLog) -> None:
    filled.append(user="bob", token="", address="", action="a", object="o", outcome=403)
    assert [entry.seq for entry in filled.entries(after=3, limit=2)] == [4, 5]
    assert [entry.seq for entry in filled.entries(limit=2, newest=True)] == [13, 12]
    assert [entry.seq for entry in filled.entries(user="bob")] == [13]
