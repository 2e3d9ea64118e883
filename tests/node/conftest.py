"""A node with real files and processes, and a manager that wants what a test tells it to."""

import base64
import hashlib
import io
import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flops.core.consent import Consent
from flops.core.errors import NotFoundError
from flops.images import Lock
from flops.node.assignment import Assignment
from flops.node.code import Bounded
from flops.node.data import NodeData
from flops.node.home import Membership, NodeHome
from flops.node.learners import Learners
from flops.orchestration import FakeOrchestrator

PROJECT = "p-7k2mqd"
LOCK = Lock.of(".".join(map(str, sys.version_info[:3])), [])
MEMBERSHIP = Membership("https://127.0.0.1:1", "clinic", "dora", "flopsnode_x")


def archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


CODE = archive({"model_manager.py": b"x = 1\n", "data/readme": b"hello"})


class FakeManager:
    """Gives code and lock of one project; counts what it was asked for."""

    def __init__(self) -> None:
        self.codes = {PROJECT: CODE}
        self.locks = {PROJECT: LOCK.text}
        self.asked: list[str] = []
        self.errors: list[Exception] = []
        """Raised by the next calls, one each."""
        self.answer: dict[str, Any] = {"number": 1, "wanted": [], "logs": []}
        self.reports: list[Mapping[str, Any]] = []

    def sync(self, report: Mapping[str, Any]) -> dict[str, Any]:
        self._ask("sync")
        self.reports.append(report)
        if report["known"] == self.answer["number"]:
            time.sleep(min(report["wait_s"], 0.05))
        return self.answer

    def code(self, assignment: Assignment, into: Path, check: Callable[[], None]) -> None:
        self._ask("code")
        content = self._of(self.codes, assignment.project)
        with into.open("wb") as file:
            bounded = Bounded(file, assignment.code_bytes, check)
            bounded.write(content)
            bounded.ended(assignment.code_sha256)

    def lock(self, project: str) -> str:
        self._ask("lock")
        return str(self._of(self.locks, project))

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.errors:
            raise self.errors.pop(0)

    def _of(self, known: Mapping[str, Any], project: str) -> Any:
        if project not in known:
            raise NotFoundError(f"project {project} is not wanted here")
        return known[project]


def wanted(number: int = 1, attempt: int = 1, code: bytes = CODE, **changes: Any) -> dict[str, Any]:
    """What a manager wants; ``changes`` of the assignment, ``config__`` in front: of the configuration."""
    config = {
        "project": PROJECT,
        "learner": f"learner-{number}",
        "token": "secret-of-the-learner",
        "aggregator": "grpc+tls://manager.invalid:4567",
        "seed": 7,
        # What a manager does not decide:
        "python": "/bin/evil",
        "code": "/etc",
        "log": "/etc/passwd",
        "isolate": False,
        "data": {"location": "grpc://elsewhere", "token": "t", "tags": ["hidden"], "site": "other"},
    }
    config |= {key.removeprefix("config__"): changes[key] for key in changes if key.startswith("config__")}
    assignment = {
        "project": PROJECT,
        "name": f"{PROJECT}-agent-{number}",
        "learner": f"learner-{number}",
        "owner": "ann",
        "team": "vision",
        "repository": "https://git.example.org/lab/mnist",
        "commit": "c" * 40,
        "tags": ["mnist", "ward-7"],
        "site": "north",
        "rounds_total": 3,
        "lock": LOCK.hash,
        "python": LOCK.python,
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "code_bytes": len(code),
        "attempt": attempt,
        **{key: value for key, value in changes.items() if not key.startswith("config__")},
    }
    pem = base64.b64encode(b"-----BEGIN CERTIFICATE-----\n").decode()
    files = {"project-ca.pem": pem, "cert.pem": pem, "key.pem": pem}
    files["config.json"] = base64.b64encode(json.dumps(config).encode()).decode()
    digest = hashlib.sha256(json.dumps(assignment, sort_keys=True).encode()).hexdigest()
    return {
        "name": assignment["name"],
        "project": PROJECT,
        "digest": digest,
        "assignment": assignment,
        "files": files,
    }


class NodeStage:
    """Learners of one node on an orchestrator without processes; `restart` is a kill and a new program."""

    def __init__(self, home: Path, environments: Path) -> None:
        self.home = NodeHome(home)
        self.home.make()
        self.home.settings.environments_dir.symlink_to(environments)
        self.manager = FakeManager()
        self.orchestrator = FakeOrchestrator()
        self.consent = Consent()
        self.learners = self._open()

    def restart(self) -> None:
        self.learners.close()
        self.learners = self._open()

    def _open(self) -> Learners:
        return Learners(
            self.home,
            MEMBERSHIP,
            self.orchestrator,
            self.manager,
            NodeData(self.home, self.orchestrator),
            consent=lambda: self.consent,
            changed=lambda: None,
        )

    def report(self, number: int = 1) -> dict[str, Any]:
        name = f"{PROJECT}-agent-{number}"
        return next(report for report in self.learners.reports() if report["name"] == name)

    def wait_for(self, state: str, number: int = 1) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while self.report(number)["state"] != state:
            assert time.monotonic() < deadline, self.report(number)
            time.sleep(0.01)
        return self.report(number)


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def stage(tmp_path: Path, environments: Path) -> Iterator[NodeStage]:
    stage = NodeStage(tmp_path, environments)
    yield stage
    stage.learners.close()
