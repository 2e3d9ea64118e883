"""Two managers on one PostgreSQL and one home: one acts, the other goes on where that one ends or freezes."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from flops.cli import launch
from flops.cli.follow import follow
from flops.client import Client, ProjectEvent
from flops.client.address import Address
from flops.manager.__main__ import LOST_EXIT_CODE
from tests.chaos.conftest import LEARNERS, ROUNDS, SEED
from tests.chaos.home import HomeOnPostgres
from tests.chaos.outcome import Outcome, outcome, problems, remains
from tests.chaos.processes import processes
from tests.chaos.repository import make_repository, project_spec
from tests.postgres import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]

DEADLINE_S = 300.0


@pytest.fixture
def home(tmp_path: Path, postgres: PostgresServer, environments: Path) -> Iterator[HomeOnPostgres]:
    home = HomeOnPostgres(tmp_path / "home", postgres)
    home.settings.home.mkdir()
    home.settings.environments_dir.symlink_to(environments)
    with ExitStack() as stack:
        stack.callback(home.end)
        stack.callback(launch.end_standbys, home.settings)
        yield home
    assert remains(home) == []


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _acts(home: HomeOnPostgres, address: Address) -> bool:
    client = launch.find_here(home.settings)
    if client is None:
        return False
    with client:
        return client.url == address.url


def _rounds(home: HomeOnPostgres, project: str) -> int:
    return len(home.events(project, "round.finished"))


def test_a_project_trains_on_to_the_same_bits_while_its_managers_die_and_freeze(
    home: HomeOnPostgres, tmp_path: Path, undisturbed: Outcome
) -> None:
    first = home.stand_by()
    _wait(lambda: _acts(home, first))  # there was none
    others = [home.stand_by(), home.stand_by()]
    home.put_data(LEARNERS)
    # Slower than the undisturbed one, so that it outlasts them; nothing else depends on time.
    repository = make_repository(tmp_path / "repository", fit_s=0.7)
    spec = project_spec(repository, learners=LEARNERS, rounds=ROUNDS, seed=SEED)
    with home.client() as client:
        assert client.url == first.url
        project = client.submit_project(spec=spec, idempotency_key="once")["id"]
    seen: list[ProjectEvent] = []

    def watch() -> None:
        for event in follow(project, lambda: launch.find_here(home.settings)):
            if isinstance(event, ProjectEvent):
                seen.append(event)

    watching = threading.Thread(target=watch)
    watching.start()
    _wait(lambda: _rounds(home, project) >= 2)
    services = _services(home)
    assert len(services) >= 1 + LEARNERS

    os.kill(first.pid, signal.SIGKILL)
    os.waitpid(first.pid, 0)
    _wait(lambda: any(_acts(home, other) for other in others))
    second, third = others if _acts(home, others[0]) else others[::-1]
    with home.client() as client:
        assert client.url == second.url
        assert client.submit_project(spec=spec, idempotency_key="once")["id"] == project
        assert client.verify()["ok"]
    _wait_for_a_round(home, project)

    os.kill(second.pid, signal.SIGSTOP)
    _wait(lambda: _acts(home, third))
    _wait_for_a_round(home, project)
    assert services <= _services(home)
    with suppress(httpx.HTTPError):  # it is asked while it is frozen, and must not do it afterwards
        httpx.post(f"{second.url}/v1/projects/{project}/stop", headers=_token(home), timeout=0.3)
    os.kill(second.pid, signal.SIGCONT)
    _, status = os.waitpid(second.pid, 0)
    assert os.waitstatus_to_exitcode(status) == LOST_EXIT_CODE
    assert "has taken over" in (home.settings.logs_dir / "manager.log").read_text()

    assert home.wait(project, DEADLINE_S) == "finished", home.state(project)
    assert _acts(home, third)
    watching.join(DEADLINE_S)
    assert [event.seq for event in seen] == list(range(1, len(home.events(project)) + 1))
    assert undisturbed.differences(outcome(home, project)) == []
    assert problems(home, project) == []
    started = home.query("select name, restarts from services where project = ?", project)
    assert {restarts for _, restarts in started} == {0}
    with home.client() as client:
        assert client.verify()["ok"]


def _wait_for_a_round(home: HomeOnPostgres, project: str) -> None:
    before = _rounds(home, project)
    _wait(lambda: _rounds(home, project) > min(before, ROUNDS - 1))


def _services(home: HomeOnPostgres) -> set[tuple[int, str]]:
    """What runs for the project, and the data server."""
    kinds = ("aggregator", "agent", "data")
    return {(one.pid, one.service) for one in processes(home) if one.kind in kinds}


def test_of_managers_that_start_at_once_one_acts_and_the_other_says_who(home: HomeOnPostgres) -> None:
    found: list[Address] = []
    threads = [threading.Thread(target=lambda: found.append(home.stand_by())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len({address.pid for address in found}) == 2
    _wait(lambda: any(_acts(home, address) for address in found))
    active = next(address for address in found if _acts(home, address))
    (waiting,) = [address for address in found if address != active]
    with Client(waiting.url, token="") as client:
        _wait(lambda: client.get_health().get("active") == active.url)
        assert client.get_health()["status"] == "standby"
    for path in ("/v1/projects", "/", "/v1/ready"):
        answer = httpx.get(waiting.url + path, headers=_token(home))
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
        assert active.url in answer.json()["detail"]
    os.kill(active.pid, signal.SIGTERM)  # nothing runs: it ends at once, and gives the lease back
    os.waitpid(active.pid, 0)
    _wait(lambda: _acts(home, waiting))
    with home.client() as client:
        assert client.url == waiting.url
        assert client.get_health() == {
            "status": "ok",
            "version": client.get_health()["version"],
            "pid": waiting.pid,
            "active": None,
        }


def _token(home: HomeOnPostgres) -> dict[str, str]:
    return {"Authorization": f"Bearer {home.settings.token_file.read_text().strip()}"}
