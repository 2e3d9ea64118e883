"""Clusters by measured latency: real connections, some of them through a proxy that delays every byte."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.federation import AgentConfig, AggregatorConfig, Link, Member, Plan
from flops.federation.placement import by_latency
from flops_worker.tensors import Layout, write

MODEL_MANAGER = """\
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.parameters = [np.zeros(5, np.float32)]

    def set_model_data(self):
        pass

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        self.parameters = [p + 1 for p in self.parameters]
        return 10

    def evaluate_model(self):
        return 1.0 / float(1 + self.parameters[0][0]), 0.5, 10
"""


class SlowPath:
    """A TCP proxy that holds back what it carries; closed with the test."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._target, self._delay_s = port, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the root does not listen yet
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(self._delay_s)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _start(folder: Path, module: str, name: str) -> "subprocess.Popen[bytes]":
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(folder / f"{name}.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_learners_that_are_equally_far_away_make_a_cluster(tmp_path: Path, processes: list[Any]) -> None:
    names = ["l-1", "l-2", "l-3", "l-4"]
    far = {"l-1", "l-3"}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model_manager.py").write_text(MODEL_MANAGER)
    arrays = [np.zeros(5, np.float32)]
    with (tmp_path / "initial.safetensors").open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)
    port = _free_port()
    slow_path = SlowPath(port, 0.02)
    learners = {name: Member(f"token-{name}", 100, slot) for slot, name in enumerate(names, start=1)}
    clusters = {f"c-{number}": Member(f"token-c-{number}", slot=number, kind="cluster") for number in (1, 2)}
    addresses = {name: f"grpc+unix://{tmp_path / name}.sock" for name in clusters}
    common: dict[str, Any] = {"project": "p-test", "initial_model": str(tmp_path / "initial.safetensors")}
    root = f"grpc+tcp://127.0.0.1:{port}"
    AggregatorConfig(
        **common,
        listen=root,
        members=clusters,
        state_dir=str(tmp_path / "root"),
        newcomers=learners,
        addresses=addresses,
        plan=Plan(rounds=2, cycles=2, min_available_learners=2, start_deadline_s=60.0),
    ).write(tmp_path / "root.json")
    for name, member in clusters.items():
        AggregatorConfig(
            **common,
            listen=addresses[name],
            members=learners,
            state_dir=str(tmp_path / f"state-{name}"),
            plan=Plan(rounds=2, cycles=2, min_available_learners=2, start_deadline_s=60.0),
            parent=Link(root, name, member.token, placed=True),
        ).write(tmp_path / f"{name}.json")
        processes.append(_start(tmp_path, "flops.federation.aggregator", name))
    for name in names:
        way = slow_path.port if name in far else port
        AgentConfig(
            project="p-test",
            learner=name,
            token=f"token-{name}",
            aggregator=f"grpc+tcp://127.0.0.1:{way}",
            placed=True,
            python=sys.executable,
            code=str(tmp_path / "code"),
            threads=1,
        ).write(tmp_path / f"{name}.json")
        processes.append(_start(tmp_path, "flops.agent", name))
    aggregator = _start(tmp_path, "flops.federation.aggregator", "root")
    processes.append(aggregator)
    assert aggregator.wait(90) == 0, (tmp_path / "root.log").read_text()
    slow_path.close()
    lines = map(json.loads, (tmp_path / "root" / "reports.jsonl").read_text().splitlines())
    reports = [(line["kind"], line["data"]) for line in lines]
    (formed,) = [data for kind, data in reports if kind == "clusters.formed"]
    assert formed["clusters"] == {"c-1": ["l-2", "l-4"], "c-2": ["l-1", "l-3"]}
    assert all((formed["round_trip_ms"][name] > 30) is (name in far) for name in names)
    rounds = [data for kind, data in reports if kind == "round.finished"]
    assert [data["participants"] for data in rounds] == [2, 2]
    assert [process.wait(20) for process in processes] == [0] * 7


@given(
    learners=st.lists(st.integers(0, 10_000), min_size=1, max_size=60, unique=True),
    count=st.integers(1, 9),
    data=st.data(),
)
def test_everybody_is_in_one_cluster_and_neighbours_stay_together(
    learners: list[int], count: int, data: st.DataObject
) -> None:
    names = [f"l-{number}" for number in learners]
    measured = data.draw(st.dictionaries(st.sampled_from(names), st.floats(0, 1), max_size=len(names)))
    clusters = [f"c-{number}" for number in range(count)]
    decided = by_latency(names, measured, clusters)
    assert sorted(name for members in decided.values() for name in members) == sorted(names)
    sizes = [len(members) for members in decided.values()]
    assert max(sizes) - min(sizes) <= 1
    farthest = [
        max((measured.get(name, 2.0) for name in members), default=0.0) for members in decided.values()
    ]
    nearest = [
        min((measured.get(name, 2.0) for name in members), default=9.0) for members in decided.values()
    ]
    assert all(far <= near for far, near in zip(farthest, nearest[1:], strict=False))
