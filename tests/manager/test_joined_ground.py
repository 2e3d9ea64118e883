"""What a learner on a joined node is told, and how its project's services trust each other."""

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.federation import AgentConfig, AggregatorConfig
from flops.manager import deployment
from flops.manager.authority import Authority
from flops.manager.databases import open_own_database
from flops.manager.grounds import AGENT, AGGREGATOR, ProgramGround, config_file
from flops.manager.joined import ASSIGNMENT
from flops.manager.paths import ProjectPaths, data_token_file
from flops.manager.ports import Ports
from flops.manager.rows import Learner, Service
from flops.manager.store import Store
from flops.orchestration import ServiceSpec

ONE, OTHER = ProjectId("p-222222"), ProjectId("p-333333")
FAR = Learner(LearnerId("learner-1"), 1, "north", node="clinic")
NEAR = Learner(LearnerId("learner-2"), 2, "west")
SPEC = spec_from_mapping({"repo": "https://ann:secret@git.example.org/lab/x", "data": {"tags": ["xray"]}})


class Home:
    """A manager's folders with two projects that have a learner on a joined node each."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder)
        self.store = Store(open_own_database(self.settings))
        data_token_file(self.settings).write_text("token of the data server")
        self.ground = ProgramGround(
            self.settings, Ports(folder / "ports.json"), self.store, ["manager.example.org"]
        )
        self.results: dict[ProjectId, dict[str, Any]] = {}
        for project in (ONE, OTHER):
            self._add(project)

    def _add(self, project: ProjectId) -> None:
        checkout = ProjectPaths.of(self.settings, project).checkout
        checkout.mkdir(parents=True)
        (checkout / "model_manager.py").write_text("x = 1\n")
        self.store.create_project(
            project,
            name="x",
            spec=SPEC.to_json(redacted=True),
            source=SPEC.redacted_repo,
            rounds_total=3,
            owner="ann",
            team="vision",
        )
        assert self.store.begin(project, 20)
        results: dict[str, dict[str, Any]] = {
            "fetch": {"path": str(checkout), "commit": "c" * 40},
            "lock": {"hash": "1" * 32, "python": "3.11.2"},
            "environment": {"python": "/env/bin/python"},
            "data": {
                "tags": ["xray"],
                "sites": [{"site": one.site, "num_examples": 5, "node": one.node} for one in (FAR, NEAR)],
            },
        }
        for step, result in results.items():
            self.store.start_step(project, step)
            self.store.finish_step(project, step, result, learners=[FAR, NEAR] if step == "data" else ())
        self.results[project] = results
        deployment.write_configurations(
            *(self.settings, self.ground, project, SPEC, [FAR, NEAR], results), rounds=3, numbers={}
        )

    def told(self, project: ProjectId) -> ServiceSpec:
        services = deployment.services_of(project, SPEC, [FAR, NEAR], {}, workers=False)
        (agent,) = (one for one in services if one.role == AGENT and one.learner == FAR.learner)
        learners = {str(one.learner): one for one in (FAR, NEAR)}
        return self.ground.specification(project, SPEC, agent, learners, self.results[project])

    def files(self, project: ProjectId) -> dict[str, bytes]:
        return {file.name: file.content for file in self.told(project).files}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path)
    yield home
    home.store.close()


def test_a_joined_node_is_told_what_to_learn_and_nothing_of_this_machine(home: Home) -> None:
    spec, files = home.told(ONE), home.files(ONE)
    assert (spec.node, spec.image, spec.command) == ("clinic", None, ("flops.agent",))
    assert set(files) == {ASSIGNMENT, "config.json", "project-ca.pem", "cert.pem", "key.pem"}
    assignment = json.loads(files[ASSIGNMENT])
    assert assignment["site"] == "north"
    assert assignment["learner"] == "learner-1"
    assert (assignment["owner"], assignment["team"], assignment["tags"]) == ("ann", "vision", ["xray"])
    assert "secret" not in assignment["repository"]
    config = json.loads(files["config.json"])
    assert config["aggregator"].startswith("grpc+tls://manager.invalid:")
    assert config["token"]
    everything = b"".join(files.values()).decode()
    assert str(home.settings.home) not in everything
    assert "token of the data server" not in everything
    assert "/env/bin/python" not in everything
    assert "secret@" not in everything


def test_a_node_is_told_the_same_each_time(home: Home) -> None:
    assert home.told(ONE) == home.told(ONE)


def test_learners_here_meet_an_aggregator_that_is_open_to_nodes_over_tls_too(home: Home) -> None:
    near = AgentConfig.read(config_file(home.settings, ONE, "learner-2"))
    assert near.aggregator.startswith("grpc+tls://127.0.0.1:")
    assert near.tls is not None
    assert near.python == "/env/bin/python"
    root = AggregatorConfig.read(config_file(home.settings, ONE, "aggregator"))
    assert root.listen == near.aggregator.replace("127.0.0.1", "0.0.0.0")
    assert root.tls is not None
    assert root.tls.ca is not None
    assert root.plan.start_deadline_s == deployment.JOINED_START_S


def test_a_manager_of_this_machine_alone_opens_no_aggregator_to_others(home: Home) -> None:
    alone = ProgramGround(home.settings, Ports(home.settings.home / "ports.json"), home.store)
    assert alone.aggregator(ONE, None, "t").listen.startswith("grpc+tls://127.0.0.1:")


def test_a_project_without_joined_nodes_meets_at_sockets_as_before(home: Home) -> None:
    third = ProjectId("p-444444")
    assert home.ground.location(third, None).startswith("grpc+unix://")
    assert home.ground.members_tls(third, "learner-1") is None


@pytest.mark.parametrize(
    ("who", "lets_in"), [(ONE, True), (OTHER, False), (None, False)], ids=["own", "another", "nobody"]
)
def test_an_aggregator_lets_in_learners_of_its_own_project_alone(
    home: Home, tmp_path: Path, who: ProjectId | None, lets_in: bool
) -> None:
    tls = home.ground.aggregator(ONE, None, "t").tls
    assert tls is not None
    assert tls.cert is not None
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(tls.cert, tls.key)
    client = ssl.create_default_context(cadata=home.files(ONE)["project-ca.pem"].decode())
    if who is not None:
        client.load_cert_chain(*written(home.files(who), tmp_path))
    # Called as by another machine, which knows this one by this name.
    assert meet(server, client, "manager.example.org") == lets_in


def test_a_learner_cannot_pass_for_an_aggregator(home: Home, tmp_path: Path) -> None:
    files = home.files(ONE)
    ca = files["project-ca.pem"].decode()
    pretender = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=ca)
    pretender.load_cert_chain(*written(files, tmp_path))
    client = ssl.create_default_context(cadata=ca)
    client.check_hostname = False
    assert not meet(pretender, client, "manager.example.org")


def written(files: dict[str, bytes], folder: Path) -> tuple[Path, Path]:
    """Certificate and key, where they can be read from."""
    for name in ("cert.pem", "key.pem"):
        (folder / name).write_bytes(files[name])
    return folder / "cert.pem", folder / "key.pem"


def meet(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Whether a byte gets through between the two."""
    one, other = socket.socketpair()
    arrived: list[bytes] = []

    def serve() -> None:
        try:
            with server.wrap_socket(one, server_side=True) as accepted:
                arrived.append(accepted.recv(1))
                accepted.send(b"y")
        except (ssl.SSLError, OSError):
            one.close()

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        with client.wrap_socket(other, server_hostname=name) as connected:
            connected.send(b"x")
            return connected.recv(1) == b"y" and arrived == [b"x"]
    except (ssl.SSLError, OSError):
        return False
    finally:
        other.close()
        serving.join(60)


def test_whoever_is_started_again_has_a_certificate_that_lasts(home: Home) -> None:
    """Also those here, whose configuration names the same files as before."""
    learners = {str(one.learner): one for one in (FAR, NEAR)}
    services = [
        Service(ServiceName(f"{ONE}-aggregator"), AGGREGATOR, None),
        *(Service(ServiceName(f"{ONE}-agent-{one.number}"), AGENT, one.learner) for one in (FAR, NEAR)),
    ]
    for service in services:
        home.ground.specification(ONE, SPEC, service, learners, home.results[ONE])
        assert not home.ground.needs_certificate(ONE, service)
    folder = ProjectPaths.of(home.settings, ONE).config / "authority"
    authority = Authority(folder)
    before = {path.name: path.read_bytes() for path in (folder / "files").iterdir()}
    for path in folder.glob("*.json"):
        known = json.loads(path.read_text())
        issued = authority.issue(path.stem, known["addresses"], client=True, days=9)
        path.write_text(json.dumps({**known, **asdict(issued)}))
    for service in services:
        assert home.ground.needs_certificate(ONE, service), service
        home.ground.specification(ONE, SPEC, service, learners, home.results[ONE])
        assert not home.ground.needs_certificate(ONE, service), service
    after = {path.name: path.read_bytes() for path in (folder / "files").iterdir()}
    changed = {name for name in after if after[name] != before[name]}
    assert {name.partition(".")[0] for name in changed} == {"aggregator", "learner-2"}
    assert not any("ca" in name.partition(".")[2].split("-") for name in changed)
