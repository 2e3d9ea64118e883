"""A training whose learners are virtual, or processes of their own, over the same data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.datasets import load_digits

from flops.data import DataClient
from flops.federation import AgentConfig, AggregatorConfig, DataAccess, Member, Plan
from flops.federation.config import VirtualLearner
from flops_worker.tensors import Layout, read_layout, views, write

MODEL_MANAGER = '''\
import os

import numpy as np
import pyarrow as pa
from flops_utils.ml_repo_templates import ModelManagerTemplate
from flops_worker.door import entrance
from sklearn.linear_model import SGDClassifier


class ModelManager(ModelManagerTemplate):
    """Digits; what it draws and what it counts lasts from round to round."""

    def __init__(self):
        self.model = SGDClassifier(loss="log_loss", random_state=np.random.randint(1 << 30))
        self.model.classes_ = np.arange(10)
        self.model.coef_, self.model.intercept_ = np.zeros((10, 64)), np.zeros(10)
        self.generator = np.random.default_rng(np.random.randint(1 << 30))
        self.fits = 0

    def set_model_data(self):
        (fd,) = entrance.request()
        table = pa.ipc.open_file(pa.OSFile(f"/proc/self/fd/{fd}")).read_all()
        os.close(fd)
        self.x = np.stack(table.column("pixels").to_pylist())
        self.y = table.column("label").to_numpy()

    def get_model(self):
        return self.model

    def get_model_parameters(self):
        return [self.model.coef_, self.model.intercept_]

    def set_model_parameters(self, parameters):
        self.model.coef_, self.model.intercept_ = parameters

    def fit_model(self):
        self.fits += 1
        FAULT
        for _ in range(self.fits):  # its own state shows in the bits
            order = self.generator.permutation(len(self.y))
            self.model.partial_fit(self.x[order] + np.random.normal(0, 0.1, self.x.shape), self.y[order])
        return len(self.y), {"fits": self.fits, "pid": os.getpid(), "shard": float(self.x.sum())}

    def evaluate_model(self):
        accuracy = self.model.score(self.x, self.y)
        return 1 - accuracy, accuracy, len(self.y)
'''

TOKEN = "t0ken-of-the-tests-and-nobody-else"


class Training:
    """One training as processes; everything is ended with the test."""

    def __init__(
        self, folder: Path, learners: int, virtual: bool, workers: int, fault: str, **plan: Any
    ) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        self.names = [f"learner-{number}" for number in range(1, learners + 1)]
        self.processes: list[subprocess.Popen[bytes]] = []
        arrays: list[Any] = [np.zeros((10, 64)), np.zeros(10)]
        with (folder / "initial.safetensors").open("wb") as file:
            write(file.fileno(), Layout.of(arrays), arrays)
        code = folder / "code"
        code.mkdir()
        (code / "model_manager.py").write_text(MODEL_MANAGER.replace("FAULT", fault))
        location = f"grpc+unix://{folder / 'a.sock'}"
        self._serve_data()
        every = dict.fromkeys(
            ("min_available_learners", "min_fit_learners", "min_evaluate_learners"), learners
        )
        AggregatorConfig(
            project="p-test",
            listen=location,
            members={
                name: Member(f"token-{name}", slot=slot) for slot, name in enumerate(self.names, start=1)
            },
            initial_model=str(folder / "initial.safetensors"),
            state_dir=str(folder / "state"),
            plan=Plan(**{"rounds": 3, "learner_metrics": True, "start_deadline_s": 60.0, **every, **plan}),
        ).write(folder / "aggregator.json")
        self.rounds = plan.get("rounds", 3)
        seats = tuple(
            VirtualLearner(name, f"token-{name}", seed=slot, site=f"site-{slot}")
            for slot, name in enumerate(self.names, start=1)
        )
        common: dict[str, Any] = {
            "project": "p-test",
            "aggregator": location,
            "python": sys.executable,
            "code": str(code),
            "threads": 1,
        }
        if virtual:
            configs = {
                "agents": AgentConfig(
                    **common,
                    data=self._access(),
                    virtual=seats,
                    workers=workers,
                    log=str(folder / "code.out"),
                )
            }
        else:
            configs = {
                seat.learner: AgentConfig(
                    **common,
                    learner=seat.learner,
                    token=seat.token,
                    seed=seat.seed,
                    data=self._access(seat.site),
                    log=str(folder / f"{seat.learner}.out"),
                )
                for seat in seats
            }
        self.agents = {}
        for name, config in configs.items():
            config.write(folder / f"{name}.json")
            self.agents[name] = self._start("flops.agent", name)
        self.aggregator = self.start_aggregator()

    def start_aggregator(self) -> "subprocess.Popen[bytes]":
        return self._start("flops.federation.aggregator", "aggregator")

    def reports(self, kind: str) -> list[dict[str, Any]]:
        file = self.folder / "state" / "reports.jsonl"
        if not file.exists():
            return []
        lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return [line["data"] for line in lines if line["kind"] == kind]

    def wait_for_round(self, number: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.reports("round.finished")) < number:
            assert time.monotonic() < deadline, self.logs()
            assert self.aggregator.poll() is None, self.logs()
            time.sleep(0.01)

    def result(self, timeout_s: float = 120.0) -> list[bytes]:
        """The bits of the last global model."""
        assert self.aggregator.wait(timeout_s) == 0, self.logs()
        path = self.folder / "state" / f"global-{self.rounds}.safetensors"
        with path.open("rb") as file:
            layout, offset = read_layout(file.fileno())
        return [array.tobytes() for array in views(layout, path.read_bytes()[offset:])]

    def measured(self, name: str) -> list[dict[str, float]]:
        """What every learner measured under that name, round by round."""
        return [
            {learner: metrics[name] for learner, metrics in data["learners"].items() if name in metrics}
            for data in self.reports("round.finished")
        ]

    def logs(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def _start(self, module: str, name: str) -> "subprocess.Popen[bytes]":
        return self._run(name, "-m", module, "--config", str(self.folder / f"{name}.json"))

    def _run(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def _access(self, site: str = "") -> DataAccess:
        return DataAccess(f"grpc+unix://{self.folder / 'd.sock'}", TOKEN, ("digits",), site)

    def _serve_data(self) -> None:
        """Digits in unequal shards, on a real data server."""
        location, token_file = f"grpc+unix://{self.folder / 'd.sock'}", self.folder / "token"
        token_file.write_text(TOKEN)
        token_file.chmod(0o600)
        ready = self.folder / "data.ready"
        self._run(
            "data",
            *("-m", "flops.data.server", "--root", str(self.folder / "data"), "--ready-file", str(ready)),
            *("--socket", str(self.folder / "d.sock"), "--token-file", str(token_file)),
        )
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)
        pixels, labels = load_digits(return_X_y=True)
        with DataClient(location, TOKEN) as client:
            start = 0
            for number in range(1, len(self.names) + 1):
                part = slice(start, start := start + 40 + 10 * number)
                columns = {"pixels": list(pixels[part] / 16), "label": labels[part]}
                client.put(pa.table(columns), ["digits"], f"site-{number}", allow_metrics=True)


Train = Callable[..., Training]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Train]:
    """Starts trainings over the same digits: with virtual learners, or a process for each."""
    trainings: list[Training] = []

    def make(
        learners: int = 4, *, virtual: bool = True, workers: int = 2, fault: str = "pass", **plan: Any
    ) -> Training:
        folder = tmp_path / str(len(trainings))
        trainings.append(Training(folder, learners, virtual, workers, fault, **plan))
        return trainings[-1]

    yield make
    for training in trainings:
        training.close()
