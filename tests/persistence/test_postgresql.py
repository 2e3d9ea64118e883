"""What PostgreSQL does that a file does not: it goes away, comes back, fills up, and refuses."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from flops.core.disk import DiskFullError
from flops.core.errors import ConflictError, FlopsError, InvalidInputError
from flops.core.events import EventKind
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.databases import open_own_database
from flops.manager.paths import ProjectPaths
from flops.manager.states import Observation
from flops.manager.store import Store
from flops.persistence import DatabaseAwayError, open_database, reading, writing
from tests.postgres import PostgresServer, postgres_installed, postgres_server

PROJECT = ProjectId("p-7k2mqd")
Require = Callable[[bool, str], None]


@pytest.fixture
def killable(require: Require) -> Iterator[PostgresServer]:
    """A server for one test, which may kill it."""
    require(postgres_installed(), "PostgreSQL 15")
    with postgres_server() as server:
        yield server


def _store_with_project(url: str) -> Store:
    store = Store(open_database(url))
    store.create_project(PROJECT, name="mnist", spec={"repo": "/r"}, source="/r", rounds_total=3)
    return store


def _warn(store: Store, message: str) -> None:
    store.add_event(PROJECT, EventKind.WARNING, {"message": message})


def test_a_killed_server_loses_nothing_that_was_committed_and_is_taken_up_again(
    killable: PostgresServer,
) -> None:
    store = _store_with_project(killable.database())
    committed: list[list[str]] = [[] for _ in range(4)]
    refused: list[FlopsError] = []
    over = threading.Event()

    def write(number: int) -> None:
        count = 0
        while not over.is_set():
            message = f"{number}-{count}"
            try:
                _warn(store, message)
            except DatabaseAwayError as error:
                refused.append(error)
                time.sleep(0.02)
            else:
                committed[number].append(message)
            count += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(0.3)
        killable.kill()
        time.sleep(0.3)
        killable.start()
    before = sum(map(len, committed))
    while sum(map(len, committed)) < before + 40:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    events = store.events(PROJECT, limit=1_000_000)
    store.close()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    there = [str(event.data.get("message")) for event in events]
    for messages in committed:
        assert [message for message in there if message in set(messages)] == messages
    assert len(there) == len(set(there))
    assert refused
    assert all(killable.password not in str(error) for error in refused)


def test_a_restart_between_two_transactions_is_not_noticed(killable: PostgresServer) -> None:
    store = _store_with_project(killable.database())
    killable.stop()
    with pytest.raises(DatabaseAwayError, match=r"the database 127.0.0.1:\d+/test1 cannot be used now"):
        store.projects()
    killable.start()
    _warn(store, "it was restarted")
    assert len(store.events(PROJECT)) == 2
    store.close()


def test_managers_that_start_at_once_migrate_once(postgres: PostgresServer) -> None:
    url = postgres.empty_database()
    failures: list[BaseException] = []

    def start() -> None:
        try:
            open_database(url).dispose()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_database_is_for_one_manager_also_after_its_server_was_restarted(killable: PostgresServer) -> None:
    url = killable.database()
    first = open_database(url, alone=True)
    killable.stop()
    killable.start()
    with writing(first) as connection:
        connection.execute(sa.text("SELECT 1"))
    with pytest.raises(ConflictError, match="another manager uses the database 127"):
        open_database(url, alone=True)
    first.dispose()
    open_database(url, alone=True).dispose()


def test_a_manager_that_was_killed_keeps_nobody_out(postgres: PostgresServer) -> None:
    url = postgres.database()
    code = (
        "import sys, time; from flops.persistence import open_database, writing\n"
        "engine = open_database(sys.argv[1], alone=True)\n"
        "with writing(engine): print('in', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == b"in\n"
        manager.kill()
    open_database(url, alone=True).dispose()


def test_a_writer_waits_for_the_one_before_it_and_sees_what_it_wrote(postgres: PostgresServer) -> None:
    engine = open_database(postgres.database())
    with writing(engine) as connection:
        connection.execute(sa.text("CREATE TABLE counters (value INTEGER)"))
        connection.execute(sa.text("INSERT INTO counters VALUES (0)"))

    def count() -> None:
        for _ in range(25):
            with writing(engine) as connection:
                value = connection.execute(sa.text("SELECT value FROM counters")).scalar_one()
                connection.execute(sa.text(f"UPDATE counters SET value = {value + 1}"))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with reading(engine) as connection:
        assert connection.execute(sa.text("SELECT value FROM counters")).scalar() == 100
    engine.dispose()


def test_readers_see_one_moment(postgres: PostgresServer) -> None:
    engine = open_database(postgres.database())
    store = Store(engine)
    query = sa.text("SELECT count(*) FROM projects")
    with reading(engine) as connection:
        assert connection.execute(query).scalar() == 0
        store.create_project(PROJECT, name="mnist", spec={}, source="/r", rounds_total=3)
        assert connection.execute(query).scalar() == 0
    store.close()


@pytest.mark.parametrize(
    ("user", "password", "database", "said"),
    [
        ("flops", "wr/ong@secret", "postgres", "password authentication failed"),
        ("nobody-here", "wr/ong@secret", "postgres", "password authentication failed"),
        ("flops", None, "nowhere", 'database "nowhere" does not exist'),
    ],
)
def test_what_is_refused_is_said_without_the_password(
    postgres: PostgresServer,
    caplog: pytest.LogCaptureFixture,
    user: str,
    password: str | None,
    database: str,
    said: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = postgres.url(database, user, password)
    with pytest.raises(DatabaseAwayError, match=said) as caught:
        open_database(url)
    settings = Settings.from_environment({"FLOPS_DATABASE": url})
    told = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(settings)
    assert (password or postgres.password) not in told


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://flops:se/cret@h:port/db",
        "postgresql://flops:x@se-cret@h/db",
        "mysql://flops:se-cret@h/db",
        "postgresql://flops:se-cret@h",
        "se-cret",
    ],
)
def test_a_wrong_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInputError, match="FLOPS_DATABASE has to look like") as caught:
        open_database(url)
    assert "cret" not in "".join(traceback.format_exception(caught.value)).replace(f'"{url}"', "")


def test_a_role_that_may_not_make_tables_is_told_so(postgres: PostgresServer) -> None:
    postgres.empty_database()
    name = postgres.empty_database().rpartition("/")[2]
    postgres.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    with pytest.raises(DatabaseAwayError, match="permission denied for schema public"):
        open_database(postgres.url(name, "guest", "guest"))


def test_another_encoding_than_unicode_is_refused(postgres: PostgresServer) -> None:
    postgres.execute(
        "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'"
    )
    with pytest.raises(InvalidInputError, match="has the encoding LATIN1"):
        open_database(postgres.url("latin"))


def test_a_full_disk_is_told_and_nothing_is_lost(killable: PostgresServer, require: Require) -> None:
    require(os.geteuid() == 0, "the right to mount a disk")
    disk = killable.folder / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)]
    require(subprocess.run(mount, check=False).returncode == 0, "the right to mount a disk")
    try:
        folder = disk / "space"
        folder.mkdir()
        shutil.chown(folder, "nobody", "nogroup")
        killable.execute(f"CREATE TABLESPACE small LOCATION '{folder}'")
        killable.execute("CREATE DATABASE full_one TEMPLATE template0 TABLESPACE small")
        store = _store_with_project(killable.url("full_one"))
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(6 << 20))
        done = 0
        with pytest.raises(DiskFullError, match="no space is left for the database 127"):  # noqa: PT012
            while True:
                _warn(store, os.urandom(100_000).hex())
                done += 1
        ballast.unlink()
        _warn(store, "there is space again")
        assert len(store.events(PROJECT, limit=10_000)) == 1 + done + 1
        store.close()
    finally:
        killable.stop()
        subprocess.run(["umount", str(disk)], check=True)


def test_text_that_postgresql_cannot_hold_is_replaced(postgres: PostgresServer) -> None:
    store = _store_with_project(postgres.database())
    store.observe(PROJECT, Observation(failed=True), "it printed a\0b")
    row = store.project(PROJECT)
    store.close()
    assert row.reason == "it printed a\N{REPLACEMENT CHARACTER}b"


def test_what_is_too_long_or_too_large_is_the_callers_mistake(postgres: PostgresServer) -> None:
    store = _store_with_project(postgres.database())
    with pytest.raises(InvalidInputError, match="a value does not fit into the database"):
        store.create_project(ProjectId("p-2"), name="n" * 201, spec={}, source="/r", rounds_total=3)
    store.close()


def test_a_home_refuses_another_database_than_the_one_its_projects_are_in(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    on_file = Settings(home=tmp_path)
    on_server = Settings(home=tmp_path, database_url=postgres.database())
    open_own_database(on_file).dispose()
    open_own_database(on_server).dispose()  # nothing can be lost yet
    ProjectPaths.of(on_server, PROJECT).config.mkdir(parents=True)
    open_own_database(on_server).dispose()
    with pytest.raises(ConflictError, match=r"are in the database 127.0.0.1:\d+/test\d+, not in SQLite"):
        open_own_database(on_file)
    other = Settings(home=tmp_path, database_url=postgres.database())
    with pytest.raises(ConflictError, match="start the manager with a FLOPS_DATABASE of"):
        open_own_database(other)
    assert all(postgres.password not in path.read_text() for path in tmp_path.glob("*.json"))


def test_the_password_may_be_in_a_file_of_its_own(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = postgres.database().rpartition("/")[2]
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{postgres.port}:{name}:flops:{postgres.password}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    open_database(f"postgresql://flops@127.0.0.1:{postgres.port}/{name}").dispose()


def test_what_a_manager_starts_does_not_inherit_the_password(postgres: PostgresServer) -> None:
    code = (
        "import os, sys; from flops.manager.__main__ import _settings\n"
        "print(_settings([]).database_url == sys.argv[1], 'FLOPS_DATABASE' in os.environ)"
    )
    url = postgres.url("postgres")
    ended = subprocess.run(
        [sys.executable, "-c", code, url],
        env={**os.environ, "FLOPS_DATABASE": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "True False\n"


def test_a_manager_that_gets_no_database_ends_with_one_sentence(
    killable: PostgresServer, tmp_path: Path
) -> None:
    url = killable.database()
    killable.stop()
    environment = {**os.environ, "FLOPS_DATABASE": url}
    command = [sys.executable, "-m", "flops.manager", "--home", str(tmp_path / "home")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("the database 127.0.0.1:")
    assert "Traceback" not in ended.stderr
    assert killable.password not in ended.stderr
