"""Writers of one SQLite file: threads take turns, other programs are waited for."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from flops.persistence import DatabaseAwayError, connect, sqlite, writing
from flops.persistence.turns import Turns


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Engine]:
    """It waits for other programs for a fifth of a second only."""
    pragmas = [text for text in sqlite._PRAGMAS if "busy_timeout" not in text]
    monkeypatch.setattr(sqlite, "_PRAGMAS", (*pragmas, "PRAGMA busy_timeout=200"))
    engine = connect(tmp_path / "a.db")
    with writing(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    yield engine
    engine.dispose()


def test_threads_wait_for_their_turn_however_long_that_takes(engine: sa.Engine) -> None:
    begun, go_on = threading.Event(), threading.Event()
    failed: list[Exception] = []

    def write(number: int) -> None:
        try:
            with writing(engine) as connection:
                connection.exec_driver_sql(f"INSERT INTO t VALUES ({number})")
                begun.set()
                assert go_on.wait(20)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    _until_they_wait(engine.get_execution_options()["turns"], 4)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert not failed
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM t").scalar() == 5


def _until_they_wait(turns: Turns, many: int) -> None:
    deadline = time.monotonic() + 20
    while len(turns._waiting) < many:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_program_that_holds_the_file_is_waited_for_and_then_named(engine: sa.Engine) -> None:
    other = sqlite3.connect(str(engine.url.database), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with (
        pytest.raises(DatabaseAwayError, match=r"another program has held .*a\.db"),
        writing(engine),
    ):
        pass
    other.execute("COMMIT")
    other.close()
    with writing(engine) as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")


def test_turns_go_by_the_order_of_asking() -> None:
    turns, order = Turns(), []

    def take(number: int) -> None:
        with turns.taken():
            order.append(number)

    threads = []
    with turns.taken():
        for number in range(20):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            _until_they_wait(turns, number + 1)
    for thread in threads:
        thread.join(20)
    assert order == list(range(20))


def test_a_transaction_within_a_transaction_is_a_mistake_that_is_told(engine: sa.Engine) -> None:
    with writing(engine), pytest.raises(RuntimeError, match="within another one"), writing(engine):
        pass
    with writing(engine):
        pass
