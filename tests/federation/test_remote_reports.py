"""From one machine to another: reports and models over TLS, and workers in containers of their own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flops.core.clock import SystemClock
from flops.core.errors import InvalidInputError
from flops.core.events import EventKind
from flops.federation import AgentConfig, AggregatorConfig, Member, Plan, ReportTo
from flops.federation.config import VirtualLearner
from flops.federation.postbox import sha256_of
from flops.federation.reports import Reporter
from flops.guest import guest_path
from flops.manager.authority import Authority
from tests.federation.conftest import write_model
from tests.federation.test_processes import MODEL_MANAGER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Require

TOKEN = "secret-of-the-project"
REPORTS = "/internal/v1/projects/p-test/reports"
MODEL = "/internal/v1/projects/p-test/model"
T = 30.0


@dataclass
class Manager:
    """The manager's end: a real HTTPS server, which keeps what it gets."""

    port: int = 0
    received: list[dict[str, Any]] = field(default_factory=list)
    models: list[bytes] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Statuses of the next answers to models, before anything is read; 0: hang up after the first bytes."""
    pause_s: float = 0.0
    """After each part of a model."""

    def accept(self, reports: list[dict[str, Any]]) -> int:
        known = self.received[-1]["seq"] if self.received else 0
        self.received += [report for report in reports if report["seq"] > known]
        return int(self.received[-1]["seq"]) if self.received else 0

    def kinds(self) -> list[str]:
        return [report["kind"] for report in self.received]


def handler(manager: Manager) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = T

        def do_POST(self) -> None:
            assert self.path == REPORTS
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.answer(401, {})
            return self.answer(200, {"accepted": manager.accept(body["reports"])})

        def do_PUT(self) -> None:
            assert self.path == MODEL
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.answer(401, {})
            assert EventKind.TRAINING_FINISHED not in manager.kinds()
            if manager.answers and (status := manager.answers.pop(0)):
                return self.answer(status, {})
            if manager.answers == [0]:
                manager.answers.clear()
            size, parts = int(self.headers["Content-Length"]), []
            while size and (part := self.rfile.read(min(size, 1 << 20))):
                parts.append(part)
                size -= len(part)
                time.sleep(manager.pause_s)
            content = b"".join(parts)
            assert hashlib.sha256(content).hexdigest() == self.headers["X-FLOps-SHA256"]
            manager.models.append(content)
            return self.answer(201, {"sha256": self.headers["X-FLOps-SHA256"]})

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


class Hosting:
    """Managers that listen, and their authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder / "authority")
        self._servers: list[tuple[http.server.ThreadingHTTPServer, threading.Thread]] = []

    def listen(
        self, manager: Manager, *, authority: Authority | None = None, address: str = "127.0.0.1"
    ) -> None:
        issued = (authority or self.authority).issue("manager", [address])
        pem = self.folder / "manager.pem"
        pem.write_text(issued.certificate + issued.key)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", manager.port), handler(manager))
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        manager.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self._servers.append((server, thread))

    def close(self) -> None:
        while self._servers:
            server, thread = self._servers.pop()
            server.shutdown()
            thread.join(T)
            server.server_close()

    def to(self, manager: Manager, **changes: Any) -> ReportTo:
        url = f"https://127.0.0.1:{manager.port}"
        to = ReportTo(TOKEN, REPORTS, url=url, ca=str(self.authority.certificate_file), upload=True)
        return replace(to, **changes)


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    one = Hosting(tmp_path)
    yield one
    one.close()


Report = "Callable[[ReportTo], Reporter]"


@pytest.fixture
def reporter(tmp_path: Path) -> Iterator[Callable[[ReportTo], Reporter]]:
    """Makes reporters over one file, as an aggregator has them life after life."""
    made: list[Reporter] = []

    def make(to: ReportTo) -> Reporter:
        made.append(Reporter(tmp_path / "reports.jsonl", to, SystemClock()))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A trained model of 8 MB."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(np.random.default_rng(1).bytes(8 << 20))
    return path


def finish(reporter: Reporter, model: Path) -> None:
    reporter.report(EventKind.ROUND_FINISHED, round=1)
    reporter.report(EventKind.TRAINING_FINISHED, model_file=str(model), model_sha256=sha256_of(model))


def test_the_model_arrives_before_the_end_is_reported(
    hosting: Hosting, reporter: Callable[[ReportTo], Reporter], model: Path
) -> None:
    manager = Manager()
    hosting.listen(manager)
    one = reporter(hosting.to(manager))
    finish(one, model)
    assert one.flush(T)
    assert manager.kinds() == ["round.finished", "training.finished"]
    assert manager.models == [model.read_bytes()]
    assert manager.received[-1]["data"]["model_sha256"] == hashlib.sha256(manager.models[0]).hexdigest()


def test_reports_and_model_wait_for_a_manager_that_is_away(
    hosting: Hosting, reporter: Callable[[ReportTo], Reporter], model: Path
) -> None:
    manager = Manager()
    hosting.listen(manager)
    hosting.close()
    one = reporter(hosting.to(manager))
    finish(one, model)
    assert not one.flush(0.5)
    one.close()
    manager.answers = [503, 500, 0]
    hosting.listen(manager)
    again = reporter(hosting.to(manager))
    assert again.flush(T)
    assert manager.kinds() == ["round.finished", "training.finished"]
    assert manager.models == [model.read_bytes()]


@pytest.mark.parametrize("case", ["another authority", "another host"])
def test_nobody_but_the_manager_is_told_anything(
    hosting: Hosting, reporter: Callable[[ReportTo], Reporter], model: Path, tmp_path: Path, case: str
) -> None:
    stranger, manager = Manager(), Manager()
    if case == "another authority":
        hosting.listen(stranger, authority=Authority(tmp_path / "stranger"))
    else:
        hosting.listen(stranger, address="127.0.0.2")
    one = reporter(hosting.to(stranger))
    finish(one, model)
    assert not one.flush(1.0)
    assert stranger.received == []
    hosting.close()
    manager.port = stranger.port
    hosting.listen(manager)
    assert one.flush(T)
    assert manager.kinds() == ["round.finished", "training.finished"]


def test_a_manager_that_does_not_know_the_project_is_not_waited_for(
    hosting: Hosting, reporter: Callable[[ReportTo], Reporter], model: Path
) -> None:
    manager = Manager(answers=[404] * 1000)
    hosting.listen(manager)
    one = reporter(hosting.to(manager))
    finish(one, model)
    begin = time.monotonic()
    assert not one.flush(60)
    assert time.monotonic() - begin < 10
    assert manager.kinds() == ["round.finished"]
    other = reporter(hosting.to(manager, token="of another project"))
    assert not other.flush(60)
    assert time.monotonic() - begin < 10


def test_a_slow_transfer_is_not_taken_for_silence(
    hosting: Hosting, reporter: Callable[[ReportTo], Reporter], model: Path
) -> None:
    manager = Manager(pause_s=0.4)
    hosting.listen(manager)
    one = reporter(hosting.to(manager))
    finish(one, model)
    begin = time.monotonic()
    assert one.flush(2.0)
    assert time.monotonic() - begin > 2.5


def test_reports_that_would_not_be_safe_are_refused() -> None:
    for to in (
        {"url": "http://10.0.0.1:80", "ca": "ca.pem"},
        {"url": "https://10.0.0.1:80"},
        {},
        {"socket": "/s", "url": "https://10.0.0.1:80", "ca": "ca.pem"},
    ):
        with pytest.raises(InvalidInputError):
            ReportTo(TOKEN, REPORTS, **to)  # type: ignore[arg-type]


def test_virtual_learners_have_no_container_of_their_own() -> None:
    with pytest.raises(InvalidInputError, match="starts no interpreter, and has one learner"):
        AgentConfig(project="p", aggregator="a", worker_socket="/s", virtual=(VirtualLearner("a", "t"),))


class Site:
    """One learner's agent and its aggregator; the worker is the agent's, or contained: it has mounts, network
    and processes of its own.
    """

    def __init__(self, folder: Path, hosting: Hosting, manager: Manager, *, contained: bool) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        write_model(folder / "initial.safetensors", [np.zeros((50, 40), np.float32), np.zeros(7)])
        (folder / "code").mkdir()
        code = MODEL_MANAGER.replace("FAULT", "pass").replace("ROWS", "50").replace("0.05", "0.2")
        (folder / "code" / "model_manager.py").write_text(code)
        location = f"grpc+unix://{folder / 'a.sock'}"
        AggregatorConfig(
            project="p-test",
            listen=location,
            members={"l-0": Member("token-l-0")},
            initial_model=str(folder / "initial.safetensors"),
            state_dir=str(folder / "state"),
            plan=Plan(rounds=4, start_deadline_s=60.0),
            report=hosting.to(manager),
        ).write(folder / "aggregator.json")
        program = {"python": sys.executable, "code": str(folder / "code"), "threads": 1}
        own: dict[str, Any] = {"worker_socket": str(folder / "seat" / "agent.sock")} if contained else program
        AgentConfig(project="p-test", learner="l-0", token="token-l-0", aggregator=location, **own).write(
            folder / "agent.json"
        )
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, name: str, *before: str) -> subprocess.Popen[bytes]:
        return self._start(
            [*before, sys.executable, "-m", module, "--config", str(self.folder / f"{name}.json")]
        )

    def start_worker(self) -> subprocess.Popen[bytes]:
        arguments = [
            "--connect",
            str(self.folder / "seat" / "agent.sock"),
            "--code",
            str(self.folder / "code"),
        ]
        command = [*OWN_NAMESPACES, sys.executable, "-m", "flops_worker", *arguments, "--threads", "1"]
        return self._start(command, cwd=guest_path(), env={"PATH": os.environ["PATH"]})

    def _start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
        self.processes.append(process)
        return process

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(60)
        except subprocess.TimeoutExpired as error:
            raise AssertionError((self.folder / "log").read_text()) from error

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(T)


OWN_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.fixture
def site(hosting: Hosting, require: Require) -> Iterator[Callable[..., Site]]:
    probe = subprocess.run([*OWN_NAMESPACES, "true"], capture_output=True, check=False)
    require(probe.returncode == 0, f"a namespace ({probe.stderr.decode().strip()})")
    made: list[Site] = []
    parent = Path(tempfile.mkdtemp(prefix="flops-remote-"))

    def make(manager: Manager, *, contained: bool) -> Site:
        made.append(Site(parent / str(len(made)), hosting, manager, contained=contained))
        return made[-1]

    yield make
    for one in made:
        one.close()
    shutil.rmtree(parent)


@pytest.mark.parametrize("killed", [None, "agent", "worker"])
def test_a_training_with_a_contained_worker_ends_with_the_same_bits(
    site: Callable[..., Site], hosting: Hosting, killed: str | None
) -> None:
    """Whatever is killed is started again, as its orchestrator does it."""
    results = []
    for contained in (False, True):
        manager = Manager()
        hosting.listen(manager)
        one = site(manager, contained=contained)
        aggregator = one.start("flops.federation.aggregator", "aggregator")
        agent = one.start("flops.agent", "agent")
        if contained:
            worker = one.start_worker()
            if killed is not None:
                while "round.finished" not in manager.kinds():
                    assert aggregator.poll() is None, (one.folder / "log").read_text()
                    time.sleep(0.01)
            if killed == "agent":
                agent.kill()
                agent.wait(T)
                assert one.wait(worker) == 3
                agent = one.start("flops.agent", "agent")
            elif killed == "worker":
                worker.kill()
                worker.wait(T)
            if killed is not None:
                worker = one.start_worker()
            assert one.wait(worker) == 0
        assert one.wait(agent) == 0
        assert one.wait(aggregator) == 0
        assert manager.kinds()[-1] == "training.finished"
        results += manager.models
    assert len(results) == 2
    assert results[0] == results[1]


def test_an_aggregator_that_is_the_first_process_ends_when_it_is_told_to(
    site: Callable[..., Site], hosting: Hosting
) -> None:
    manager = Manager()
    hosting.listen(manager)
    one = site(manager, contained=True)
    aggregator = one.start(
        "flops.federation.aggregator", "aggregator", "unshare", "--pid", "--fork", "--mount-proc"
    )
    deadline = time.monotonic() + T
    while not (one.folder / "a.sock").exists():
        assert time.monotonic() < deadline, (one.folder / "log").read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{aggregator.pid}/task/{aggregator.pid}/children").read_text()
    os.kill(int(children), signal.SIGTERM)
    assert aggregator.wait(5.0) == 128 + signal.SIGTERM
