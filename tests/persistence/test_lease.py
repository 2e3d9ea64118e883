"""Two managers on one PostgreSQL: one acts, and who has lost the lease changes nothing any more."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest
import sqlalchemy as sa

from flops.core.errors import ConflictError
from flops.persistence import DatabaseAwayError, LeaseLostError, lease_of, open_database, reading, writing
from flops.persistence.lease import EXPIRES_S, GivenUp, Holder, Lease, StandBy
from tests.postgres import PostgresServer

DEADLINE_S = 60.0
_INSERT = "INSERT INTO written VALUES ('{}')"

_HOLDER = """
import sys, threading, time
import sqlalchemy as sa
from flops.persistence import lease_of, open_database, writing
engine = open_database(sys.argv[1], alone=True)
lease = lease_of(engine)
in_transaction = sys.argv[2] == "in a transaction"
if in_transaction:
    with writing(engine) as connection:
        connection.execute(sa.text(sys.argv[3]))
        print("in", flush=True)
        sys.stdin.readline()
else:
    print("in", flush=True)
    sys.stdin.readline()
    print(lease.holds, flush=True)
    try:
        with writing(engine) as connection:
            connection.execute(sa.text(sys.argv[3]))
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


@contextmanager
def _process(url: str, way: str) -> "Iterator[subprocess.Popen[str]]":
    """A process that holds the lease, until it is given a line."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, url, way, _INSERT.format("zombie")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "in\n", holder.stderr and holder.stderr.read()
            yield holder
        finally:
            holder.kill()


@contextmanager
def _alone(url: str, standing_by: StandBy | None = None) -> Iterator[sa.Engine]:
    engine = open_database(url, alone=True, standing_by=standing_by)
    try:
        yield engine
    finally:
        engine.dispose()


def _written(engine: sa.Engine) -> list[str]:
    with reading(engine) as connection:
        return list(connection.execute(sa.text("SELECT who FROM written")).scalars())


def _lease(engine: sa.Engine) -> Lease:
    lease = lease_of(engine)
    assert lease is not None
    return lease


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_manager_is_told_who_acts_and_where(postgres: PostgresServer) -> None:
    url = postgres.database()
    with _alone(url) as engine:
        _lease(engine).announce("http://127.0.0.1:8780")
        with pytest.raises(ConflictError, match=rf"another manager uses the database .*pid {os.getpid()} on"):
            open_database(url, alone=True)
        assert _lease(engine).holds


def test_who_stands_by_is_told_of_the_holder_and_has_the_lease_as_soon_as_that_one_ends(
    postgres: PostgresServer,
) -> None:
    url = postgres.database()
    told: list[Holder] = []
    got = threading.Event()

    def stand_by() -> None:
        with _alone(url, StandBy(told=told.append)):
            got.set()

    engine = open_database(url, alone=True)
    waiting = threading.Thread(target=stand_by)
    waiting.start()
    _wait(lambda: bool(told))
    _lease(engine).announce("http://127.0.0.1:8780")
    _wait(lambda: told[-1].address == "http://127.0.0.1:8780")
    assert not got.is_set()
    engine.dispose()
    waiting.join(DEADLINE_S)
    assert got.is_set()


def test_waiting_can_be_given_up(postgres: PostgresServer) -> None:
    url = postgres.database()
    given_up = threading.Event()
    with _alone(url), pytest.raises(GivenUp):
        open_database(url, alone=True, standing_by=StandBy(given_up, lambda holder: given_up.set()))


def test_a_holder_of_this_machine_that_was_killed_is_not_waited_for(postgres: PostgresServer) -> None:
    url = postgres.database()
    with _process(url, "idle") as holder:
        holder.kill()
        _wait(lambda: holder.poll() is not None)
        with _alone(url) as engine:
            assert _lease(engine).holds
            with reading(engine) as connection:
                place = connection.execute(sa.text("SELECT epoch FROM manager_lease")).scalar()
            assert place == 2


@pytest.mark.parametrize("way", ["idle", "in a transaction"])
def test_a_frozen_holder_is_taken_over_and_changes_nothing_when_it_thaws(
    postgres: PostgresServer, way: str
) -> None:
    url = postgres.database()
    postgres.execute("CREATE TABLE written (who TEXT)", url.rpartition("/")[2])
    with _process(url, way) as holder:
        holder.send_signal(signal.SIGSTOP)
        with _alone(url, StandBy()) as engine:
            assert _lease(engine).holds
            holder.send_signal(signal.SIGCONT)
            output, errors = holder.communicate("\n", timeout=DEADLINE_S)
            if way == "idle":
                held, said = output.splitlines()
                assert held == "False"
                assert said.startswith("LeaseLostError another manager, pid ")
            else:
                assert "DatabaseAwayError" in errors
            assert _written(engine) == []
            with writing(engine) as connection:
                connection.execute(sa.text(_INSERT.format("new")))
            assert _written(engine) == ["new"]


def test_a_frozen_holder_of_this_machine_can_be_ended_by_who_took_over(postgres: PostgresServer) -> None:
    url = postgres.database()
    with _process(url, "idle") as holder:
        holder.send_signal(signal.SIGSTOP)
        with _alone(url, StandBy()) as engine:
            _lease(engine).end_predecessor()
            assert holder.wait(DEADLINE_S) == -signal.SIGKILL
            _lease(engine).end_predecessor()  # no effect: it is gone, and its number may be somebody else's


def test_who_is_cut_off_from_the_database_stops_before_another_may_begin(postgres: PostgresServer) -> None:
    url = postgres.database()
    lost = threading.Event()
    with _alone(url) as engine:
        lease = _lease(engine)
        lease.on_lost = lambda message: lost.set()
        cut = threading.Event()
        connect = lease._connect

        def no_way(timeout_ms: int) -> object:
            if cut.is_set():
                raise DatabaseAwayError("cut")
            return connect(timeout_ms)

        lease._connect = no_way  # type: ignore[assignment]
        cut.set()
        with lease._turn:
            assert lease._session is not None
            lease._session.close()
        stopped: list[float] = []

        def watch() -> None:
            while lease.holds:
                time.sleep(0.005)
            stopped.append(time.monotonic())

        watching = threading.Thread(target=watch)
        watching.start()
        with _alone(url, StandBy()) as other:
            begun = time.monotonic()
            watching.join(DEADLINE_S)
            assert stopped[0] < begun
            with pytest.raises(DatabaseAwayError, match="was not renewed"):
                lease.check()
            assert _lease(other).holds
            with pytest.raises(LeaseLostError), writing(engine):
                pass
            with pytest.raises(LeaseLostError):
                lease.check()
            assert lost.is_set()


def test_a_lease_that_ran_out_is_its_holders_again_where_nobody_took_it(postgres: PostgresServer) -> None:
    with _alone(postgres.database()) as engine:
        lease = _lease(engine)
        with lease._turn:  # no renewal
            _wait(lambda: not lease.holds)
            time.sleep(EXPIRES_S / 5)
        _wait(lambda: lease.holds)
        with writing(engine):
            lease.check()


def test_at_no_moment_two_hold_the_lease(postgres: PostgresServer) -> None:
    url = postgres.database()
    holding: set[int] = set()
    epochs: list[int] = []
    mistakes: list[str] = []
    turn = threading.Lock()
    over = threading.Event()

    def manage(number: int) -> None:
        while not over.is_set():
            with suppress(GivenUp), closing(_Disposed(url, over)) as manager:
                with turn:
                    if holding:
                        mistakes.append(f"{number} beside {holding}")
                    holding.add(number)
                with writing(manager.engine) as connection:
                    epochs.append(connection.execute(sa.text("SELECT epoch FROM manager_lease")).scalar_one())
                with turn:
                    if holding != {number}:
                        mistakes.append(f"{holding} in {number}")
                    holding.discard(number)

    threads = [threading.Thread(target=manage, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    _wait(lambda: len(epochs) >= 12)
    over.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert mistakes == []
    assert epochs == list(range(1, len(epochs) + 1))


class _Disposed:
    def __init__(self, url: str, over: threading.Event) -> None:
        self.engine = open_database(url, alone=True, standing_by=StandBy(over))

    def close(self) -> None:
        self.engine.dispose()


def test_a_lost_connection_of_a_writer_is_no_lost_lease(postgres: PostgresServer) -> None:
    url = postgres.database()
    with _alone(url) as engine:
        name = _lease(engine).application_name
        postgres.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{name}'"
        )
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with suppress(DatabaseAwayError), writing(engine):
                break
        assert _lease(engine).holds
