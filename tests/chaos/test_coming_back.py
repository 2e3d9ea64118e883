"""What is asked again when the one that should answer has died, and what ends for want of space."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flops.agent import fragments
from flops.agent.fragments import Fragments
from flops.core.disk import EXIT_WITHOUT_SPACE, DiskFullError
from flops.core.errors import NotFoundError, UnavailableError
from flops.federation import DataAccess
from flops.guest import GuestDied, LastingSeat, Worker
from flops.guest.worker import MAX_LIVES
from flops.images import uv
from flops.images.uv import KilledError
from flops.manager import steps
from flops.persistence import open_database, reading, writing
from flops_worker import CUT_OFF


class DyingServer:
    """A data client whose server is away for a while."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def write_matching(self, tags: Sequence[str], site: str, fd: int) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return os.write(fd, b"rows")


def fragments_of(server: DyingServer, monkeypatch: pytest.MonkeyPatch) -> Fragments:
    found = Fragments(DataAccess("grpc+unix:///nowhere", "t" * 16, ("tag",), "site"))
    monkeypatch.setattr(found, "_opened", server)
    monkeypatch.setattr(fragments, "_FIRST_PAUSE_S", 0.001)
    return found


def test_data_are_asked_for_again_until_the_data_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    away = [UnavailableError("no data server answers") for _ in range(5)]
    (fd,) = fragments_of(DyingServer(*away), monkeypatch).of_site("site")
    assert os.pread(fd, 10, 0) == b"rows"
    os.close(fd)


def test_data_that_are_not_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        fragments_of(DyingServer(NotFoundError("no fragment matches")), monkeypatch).of_site("site")


class MortalGuest:
    """A guest of one seat that dies as it is told."""

    def __init__(self, deaths: list[GuestDied | None]) -> None:
        self._deaths = deaths

    def seat(self, key: int, **_: Any) -> Any:
        return self

    def fit(self, *_: Any) -> str:
        death = self._deaths.pop(0) if self._deaths else None
        if death is not None:
            raise death
        return "fitted"

    def drop_update(self) -> None:
        pass

    def kill(self) -> None:
        pass


def died(signal: str | None = "SIGKILL", exit_code: int | None = None) -> GuestDied:
    return GuestDied(where="fit_model", exit_code=exit_code, signal=signal, log=[])


def seat_with(*deaths: GuestDied | None) -> LastingSeat:
    remaining = list(deaths)
    return LastingSeat(Worker(lambda: MortalGuest(remaining)), 0, 1, None)  # type: ignore[arg-type, return-value]


def fit(seat: LastingSeat) -> Any:
    return seat.fit(0, 1, 2, {})


def test_a_worker_may_be_killed_as_often_as_it_likes_while_its_learner_makes_progress() -> None:
    seat = seat_with(*[died(), died(), None] * 10)
    assert [fit(seat) for _ in range(10)] == ["fitted"] * 10


def test_a_worker_whose_channel_is_cut_is_started_again() -> None:
    assert fit(seat_with(died(None, CUT_OFF))) == "fitted"


def test_a_worker_that_is_killed_by_every_attempt_is_given_up() -> None:
    with pytest.raises(GuestDied):
        fit(seat_with(*[died()] * MAX_LIVES))


def test_a_worker_that_ended_by_itself_is_not_started_again() -> None:
    with pytest.raises(GuestDied):
        fit(seat_with(died(None, 9)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_process_that_finds_no_space_ends_with_a_code_that_means_try_again(wrapped: bool) -> None:
    code = (
        "import errno, sys, threading\n"
        "from pathlib import Path\n"
        "from flops.core.errors import FailedError\n"
        "from flops.federation.space import needing_space\n"
        "def write():\n"
        "    with needing_space(Path('/state'), 'the training'):\n"
        "        full = OSError(errno.ENOSPC, 'No space left on device')\n"
        "        if sys.argv[1:]:\n"
        "            raise FailedError('it cannot be written') from full\n"
        "        raise full\n"
        "threading.Thread(target=write).start()\n"
        "threading.Event().wait(30)\n"
    )
    arguments = ["wrapped"] if wrapped else []
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == EXIT_WITHOUT_SPACE
    assert "no space is left in /state - free some there: the training waits" in result.stderr


def test_what_user_code_prints_to_a_full_disk_is_lost_and_nothing_else() -> None:
    code = (
        "import sys\n"
        "from flops_worker.__main__ import _lenient\n"
        "sys.stdout = _lenient(1)\n"
        "print('a line that is lost', flush=True)\n"
        "sys.exit(7)\n"
    )
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, timeout=60, check=False)
    assert result.returncode == 7


def test_a_killed_uv_is_told_from_one_that_failed() -> None:
    with pytest.raises(KilledError, match="was killed by SIGKILL"):
        uv.start(["sh", "-c", "kill -9 $$"], os.environ, 30.0)
    assert uv.start(["sh", "-c", "exit 9"], os.environ, 30.0).returncode == 9


def test_uv_weighs_no_more_than_the_step_that_runs_it() -> None:
    """The kernel shares processors among sessions (sched(7)): one of its own would step aside for nobody."""
    finished = uv.start(["sh", "-c", "cut -d' ' -f5,6 /proc/$$/stat; echo $$"], os.environ, 30.0)
    group, session, pid = finished.stdout.split()
    assert int(session) == os.getsid(0)
    assert group == pid  # and is ended with all that it started


@pytest.mark.parametrize("kills", [2, 3])
def test_a_step_under_which_a_process_is_killed_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kills: int
) -> None:
    deaths = [died(), KilledError("uv", 9), died()][:kills]

    def step(*_: Any) -> dict[str, Any]:
        if deaths:
            raise deaths.pop(0)
        return {"done": True}

    monkeypatch.setitem(steps.OWN_STEPS, "data-list", step)
    told: list[str] = []
    if kills < 3:
        assert steps.run_step("data-list", {"home": str(tmp_path)}, told.append) == {"done": True}
    else:
        with pytest.raises(GuestDied):
            steps.run_step("data-list", {"home": str(tmp_path)}, told.append)
    assert told == ["a process of step 'data-list' was killed, the step is begun again"] * 2


def test_a_database_without_space_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "manager.db")
    told = f"no space is left in {tmp_path} - free some there"

    def write() -> None:
        with writing(engine) as one:
            one.exec_driver_sql("PRAGMA max_page_count = 1")
            one.exec_driver_sql("create table large (text)")
            one.exec_driver_sql("insert into large values (zeroblob(1000000))")

    with pytest.raises(DiskFullError, match=told):
        write()
    with reading(engine) as one:
        assert one.exec_driver_sql("select count(*) from projects").scalar() == 0
        assert one.exec_driver_sql("select name from sqlite_master where name = 'large'").first() is None
    engine.dispose()
