"""A learner of a node, as the processes that it is: agent, worker and data server, with a real aggregator."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flops.federation import AggregatorConfig, Member, Plan
from flops.federation.config import Tls
from flops.images import Lock
from flops.manager.authority import Authority
from flops.node import local
from flops.node.home import NodeHome
from flops.node.program import Program
from flops.orchestration import ProcessOrchestrator
from flops_worker.tensors import Layout, write
from tests.node.conftest import MEMBERSHIP, PROJECT, FakeManager, archive, wanted

pytestmark = pytest.mark.network

MODEL_MANAGER = b"""\
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.parameters = [np.zeros(5, np.float32)]

    def set_model_data(self):
        self.rows = 3

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        self.parameters = [p + self.rows for p in self.parameters]
        return self.rows

    def evaluate_model(self):
        return 1.0, 0.5, self.rows
"""
CODE = archive({"model_manager.py": MODEL_MANAGER})


def _aggregator(folder: Path, port: int) -> Authority:
    """Write its configuration; returns the authority of the project."""
    authority = Authority(folder / "authority", "FLOps authority of the test")
    issued = authority.issue("aggregator", ["127.0.0.1"], client=True, days=1)
    (folder / "cert.pem").write_text(issued.certificate)
    (folder / "key.pem").write_text(issued.key)
    arrays: list[Any] = [np.zeros(5, np.float32)]
    with (folder / "initial.safetensors").open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)
    AggregatorConfig(
        project=PROJECT,
        listen=f"grpc+tls://127.0.0.1:{port}",
        members={"learner-1": Member("secret-of-the-learner", max_examples=3)},
        initial_model=str(folder / "initial.safetensors"),
        state_dir=str(folder / "state"),
        plan=Plan(rounds=3, start_deadline_s=120.0),
        tls=Tls(str(folder / "cert.pem"), str(folder / "key.pem"), str(authority.certificate_file)),
    ).write(folder / "aggregator.json")
    return authority


def _wait_until(what: Callable[[], Any], why: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


def test_a_learner_of_a_node_trains_and_its_owner_sees_what_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    authority = _aggregator(tmp_path, port)
    home = NodeHome(tmp_path / "home")
    home.make()
    home.keep_membership(MEMBERSHIP)
    lock = Lock.of(".".join(map(str, sys.version_info[:3])), [f"numpy=={np.__version__}"])
    manager = FakeManager()
    manager.codes, manager.locks = {PROJECT: CODE}, {PROJECT: lock.text}
    issued = authority.issue("agent-1", [], client=True, days=1)
    service = wanted(code=CODE, lock=lock.hash, config__aggregator=f"grpc+tls://manager.invalid:{port}")
    service["files"] |= {
        name: base64.b64encode(text.encode()).decode()
        for name, text in (
            ("project-ca.pem", authority.certificate),
            ("cert.pem", issued.certificate),
            ("key.pem", issued.key),
        )
    }
    orchestrator = ProcessOrchestrator(home.settings.services_dir, home.settings.logs_dir)
    claimed = home.claim()
    program = Program(home, MEMBERSHIP, orchestrator, manager)
    thread = threading.Thread(target=program.run)
    thread.start()
    aggregator = subprocess.Popen(
        [sys.executable, "-m", "flops.federation.aggregator", "--config", str(tmp_path / "aggregator.json")]
    )
    try:
        with local.data(home) as client:
            client.put(pa.table({"x": [1, 2, 3]}), ["mnist"], "north")
            client.put(pa.table({"x": [4]}), ["mnist"], "south")  # another learner's
        manager.answer = {"number": 2, "wanted": [service], "logs": []}

        def said() -> Any:
            return manager.reports[-1]["services"], local.status(home)

        _wait_until(lambda: any(one["state"] == "exited" for one in manager.reports[-1]["services"]), said)
        assert aggregator.wait(60) == 0
        (entry,) = local.journal(home)
        assert (entry["state"], entry["rounds"], entry["evaluations"]) == ("ended", 3, 3)
        assert 3 * 5 * 4 < entry["bytes_out"] < 20_000
        lines = (tmp_path / "state" / "reports.jsonl").read_text().splitlines()
        reports = [json.loads(line) for line in lines]
        (last,) = [one["data"] for one in reports if one["kind"] == "round.finished"][-1:]
        assert (last["round"], last["participants"]) == (3, 1)
        assert {one["site"] for one in manager.reports[-1]["holdings"]} == {"north", "south"}
    finally:
        program.end()
        thread.join()
        program.stop_learners("the test is over")
        program.close()
        orchestrator.stop_many([status.name for status in orchestrator.list() if status.live], 3.0)
        orchestrator.close()
        aggregator.kill()
        aggregator.wait()
        os.close(claimed)
