"""Machines of data owners take part with outgoing connections only, and their owners decide."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import User
from tests.wards import Ward, can_make_namespaces, wards

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(900)]

Repository = Any
_SITES = ("north", "south", "west")
_TIMEOUT_S = 300.0


class Owner(User):
    """A data owner on a machine of their own."""

    def __init__(self, home: Path, ward: Ward) -> None:
        super().__init__(home)
        self.ward = ward
        self.command = tuple(ward.command(*self.command))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.flops("node", "status", "--json").document
        return found

    def log(self, project: str) -> list[dict[str, Any]]:
        entries = self.flops("node", "log", "--json").document
        return [entry for entry in entries if entry["project"] == project]

    def processes(self) -> list[str]:
        """What runs of this owner's node."""
        ours = str(self.home / "node")
        return [
            " ".join(process.info["cmdline"] or [])
            for process in psutil.process_iter(["cmdline"])
            if any(ours in word for word in process.info["cmdline"] or [])
        ]


class Consortium:
    """A manager that listens to other machines, a site of its own, and two owners with one site each."""

    def __init__(self, manager: User, url: str, fingerprint: str, owners: list[Owner]) -> None:
        self.manager = manager
        self.url = url
        self.fingerprint = fingerprint
        self.owners = owners

    def join(self, owner: Owner, *options: str) -> None:
        name = f"ward-{owner.ward.number}"
        token = self.manager.flops("node", "token", name, "--json").document["token"]
        joined = owner.flops("node", "join", self.url, token, "--trust", self.fingerprint, *options, "--json")
        assert joined.code == 0, joined.stderr
        assert joined.document["connected"], joined.document

    def node(self, owner: Owner) -> dict[str, Any]:
        nodes = self.manager.flops("node", "ls", "--json").document
        return next(node for node in nodes if node["name"] == f"ward-{owner.ward.number}")


def _wait_until(what: Callable[[], Any], why: Callable[[], Any] = lambda: "") -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def _counted_nodes(consortium: Consortium) -> set[str]:
    """Nodes of which it is known what their learners use."""
    lines = consortium.manager.flops("top", "--once", "--json").document["services"]
    return {one["node"] for one in lines if one["memory_bytes"] and one["cpu_percent"] is not None}


def _table(folder: Path) -> str:
    table = folder / "t.csv"
    table.write_text("x,y\n" + "".join(f"{number},{number % 2}\n" for number in range(20)))
    return str(table)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    with wards(2) as (address, machines):
        manager = User(tmp_path_factory.mktemp("manager"))
        owners = [Owner(tmp_path_factory.mktemp(f"ward-{ward.number}"), ward) for ward in machines]
        try:
            port = 20_000 + os.getpid() % 10_000
            up = manager.flops("up", "--listen", f"{address}:{port}", "--json")
            assert up.code == 0, up.stderr
            found = Consortium(manager, f"https://{address}:{port}", up.document["fingerprint"], owners)
            put = manager.flops("data", "put", _table(manager.home), "--tag", "e2e", "--site", _SITES[2])
            assert put.code == 0, put.stderr
            for owner, site in zip(owners, _SITES, strict=False):
                found.join(owner)
                put = owner.flops("node", "put", _table(owner.home), "--tag", "e2e", "--site", site)
                assert put.code == 0, put.stderr
            _wait_until(lambda: all(found.node(owner)["tags"] == ["e2e"] for owner in owners))
            yield found
        finally:
            manager.flops("down", "--force")
            for owner in owners:
                owner.flops("node", "leave", "--purge")
                assert owner.processes() == []


def _model(user: User, project: str) -> bytes:
    return (user.home / "projects" / project / "state" / "model.safetensors").read_bytes()


def _submit(consortium: Consortium, folder: Path, *options: str) -> str:
    ended = consortium.manager.flops("run", str(folder), "--tag", "e2e", *options, "--detach", "--json")
    assert ended.code == 0, ended.stderr
    return str(ended.document["id"])


def _wait_for_round(consortium: Consortium, project: str, number: int) -> None:
    _wait_until(
        lambda: len(consortium.manager.events(project, "round.finished")) >= number,
        lambda: consortium.manager.flops("events", project).stdout,
    )


def _participants(consortium: Consortium, project: str) -> list[int]:
    """Of each round so far."""
    return [data["participants"] for data in consortium.manager.events(project, "round.finished")]


def test_learners_on_joined_nodes_arrive_at_the_bits_of_learners_beside_the_manager(
    consortium: Consortium, user: User, repository: Repository
) -> None:
    # As `load_dataset` does it, without the package that makes a dataset of it.
    folder = repository(
        header="import os\nfrom flops_worker.door import entrance\n",
        data="assert sum(os.fstat(file).st_size for file in entrance.request()) > 100",
    )
    options = ("--rounds", "3", "--min-learners", "3", "--seed", "3")
    local = user.project(str(folder), "--tag", "e2e", *options)
    assert local["state"] == "finished", local["reason"]
    spread = consortium.manager.project(str(folder), "--tag", "e2e", *options)
    assert spread["state"] == "finished", spread["reason"]
    assert _model(consortium.manager, spread["id"]) == _model(user, local["id"])

    for owner, site in zip(consortium.owners, _SITES, strict=False):
        _wait_until(lambda owner=owner: owner.status()["learners"] == [], owner.status)  # type: ignore[misc]
        (entry,) = owner.log(spread["id"])
        assert (entry["state"], entry["site"], entry["owner"]) == ("ended", site, "admin")
        assert (entry["rounds"], entry["commit"]) == (3, spread["commit"])
        assert entry["bytes_out"] > 3 * (4 * 3 * 4 + 3 * 8)
        assert not (owner.home / "node" / "projects" / spread["id"]).exists()
    # Of the data only counts have left: all fragments on the manager's machine are its own.
    own = {path.stem for path in (consortium.manager.home / "data" / "fragments").rglob("f-*")}
    far = {
        fragment["id"]
        for owner in consortium.owners
        for fragment in owner.flops("node", "data", "--json").document
    }
    assert (len(own), len(far), own & far) == (1, 2, set())


def test_nobody_can_connect_to_a_joined_machine(require: Any, consortium: Consortium) -> None:
    require(can_make_namespaces(), "the right to make network namespaces")
    assert not consortium.owners[0].ward.takes_connections(8080)


def test_joining_twice_or_with_the_wrong_words_is_refused_by_name(
    consortium: Consortium, tmp_path: Path
) -> None:
    again = consortium.owners[0].flops("node", "join", consortium.url)
    assert again.code == 0, again.stderr
    assert "is a node already" in again.stdout
    stranger = Owner(tmp_path, consortium.owners[0].ward)
    wrong = "flopsjoin_" + "0" * 12 + "_" + "a" * 43
    for trust, words in (
        ("AA:BB", "not the one that was given"),
        (consortium.fingerprint, "the join token is wrong, used or expired"),
    ):
        refused = stranger.flops("node", "join", consortium.url, wrong, "--trust", trust)
        assert (refused.code, refused.stdout) == (1, "")
        assert words in refused.stderr
    for command in ("status", "start", "stop", "leave", "data", "allow"):
        refused = stranger.flops("node", command)
        assert refused.code == 1
        assert "this machine has joined no manager - join one with 'flops node join'" in refused.stderr
    assert stranger.processes() == []


def test_a_cut_link_and_a_killed_node_cost_no_project(consortium: Consortium, repository: Repository) -> None:
    folder = repository(header="import time\n", fit="time.sleep(0.5)")
    project = _submit(consortium, folder, "--rounds", "2000", "--min-learners", "3")
    _wait_for_round(consortium, project, 2)
    cut, killed = consortium.owners
    far = {f"ward-{owner.ward.number}" for owner in consortium.owners}
    _wait_until(
        lambda: _counted_nodes(consortium) >= far, lambda: consortium.manager.flops("top", "--once", "--json")
    )
    pid = killed.status()["pid"]
    psutil.Process(pid).kill()
    if cut.ward.namespace is not None:
        cut.ward.plug(connected=False)
        time.sleep(5.0)  # the cut itself, not something that is waited for
        cut.ward.plug(connected=True)
    started = killed.flops("node", "start", "--json")
    assert started.code == 0, started.stderr
    (learner,) = killed.status()["learners"]
    assert (learner["project"], learner["state"]) == (project, "running")
    done = len(consortium.manager.events(project, "round.finished"))
    _wait_until(lambda: _participants(consortium, project)[done:].count(3) >= 2)
    assert consortium.manager.flops("stop", project).code == 0
    _wait_until(lambda: killed.status()["learners"] == [], killed.status)
    (entry,) = killed.log(project)  # one learner, not another one
    assert (entry["state"], entry["rounds"] > done) == ("ended", True)


def test_what_an_owner_does_not_allow_does_not_run(consortium: Consortium, repository: Repository) -> None:
    folder = repository()
    owner = consortium.owners[0]
    allowed = owner.flops("node", "allow", "--owner", "somebody-else", "--json")
    assert allowed.code == 0, allowed.stderr
    try:
        _wait_until(lambda: consortium.node(owner)["policy"]["owners"] == ["somebody-else"])
        ended = consortium.manager.project(
            str(folder), "--tag", "e2e", "--rounds", "2", "--min-learners", "3", "--learners", "3"
        )
        assert ended["state"] == "failed"
        assert owner.log(ended["id"]) == [] or owner.log(ended["id"])[0]["state"] == "refused"
    finally:
        owner.flops("node", "allow", "--everything")
        _wait_until(lambda: consortium.node(owner)["policy"]["owners"] == [])


def test_a_node_that_leaves_while_it_trains_leaves_nothing_running_and_the_project_goes_on(
    consortium: Consortium, repository: Repository
) -> None:
    folder = repository(header="import time\n", fit="time.sleep(0.3)")
    project = _submit(consortium, folder, "--rounds", "2000", "--min-learners", "2")
    _wait_for_round(consortium, project, 2)
    leaver = consortium.owners[0]
    left = leaver.flops("node", "leave", "--json")
    assert left.code == 0, left.stderr
    assert left.document["told"]
    assert leaver.processes() == []
    _wait_until(lambda: _participants(consortium, project)[-2:] == [2, 2])
    assert consortium.manager.flops("stop", project).code == 0
    gone = consortium.manager.flops("node", "ls", "--json").document
    assert f"ward-{leaver.ward.number}" not in [node["name"] for node in gone]
    # The data are still there, and it may join again.
    consortium.join(leaver)
    assert [one["site"] for one in leaver.flops("node", "data", "--json").document] == [_SITES[0]]


def test_an_ejected_node_ends_everything_and_says_so(consortium: Consortium) -> None:
    owner = consortium.owners[0]
    ejected = consortium.manager.flops("node", "rm", f"ward-{owner.ward.number}")
    assert ejected.code == 0, ejected.stderr
    _wait_until(lambda: owner.processes() == [], owner.processes)
    shown = owner.flops("node", "status")
    assert "the manager does not know it any more" in shown.stdout


def test_without_the_manager_a_node_goes_on_and_can_leave(consortium: Consortium) -> None:
    owner = consortium.owners[1]
    assert consortium.manager.flops("down", "--force").code == 0
    _wait_until(lambda: not owner.status()["connected"])
    left = owner.flops("node", "leave", "--json")
    assert left.code == 0, left.stderr
    assert (left.document["told"], owner.processes()) == (False, [])
    assert not (owner.home / "node" / "membership.json").exists()
