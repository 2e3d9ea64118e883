"""What a virtual learner costs in a round, beyond the user's own code.

Real MNIST over that many learners of one machine: a real data server, one agent with a few workers, a real
aggregator, logistic regression as in examples/mnist-sklearn. User code measures its own fits and evaluations.

    overhead = (duration of a round - own time of all learners / workers) / learners

A machine that has other work to do makes rounds longer; ``overhead_processor_ms_per_learner`` is what they
cost the processors beyond the own time, by the system's accounts, over the number of processors. The limit
is measured in the same run: the same requests to as many workers, without a federation.

    python -m benchmarks.virtual --learners 1000 --rounds 3 --json -
"""

import argparse
import contextlib
import functools
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import report
from flops.core.settings import Settings
from flops.data import DataClient
from flops.data.known import known_dataset
from flops.federation import AgentConfig, AggregatorConfig, DataAccess, Member, Plan
from flops.federation.config import VirtualLearner
from flops.guest import Guest, Room, Seat
from flops_worker.tensors import Layout, write

_MODEL_MANAGER = '''\
import os
import time
import warnings

import numpy as np
import pyarrow as pa
from flops_utils.ml_repo_templates import ModelManagerTemplate
from flops_worker.door import entrance
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

PIXELS = 28 * 28
CLASSES = np.arange(10)


class ModelManager(ModelManagerTemplate):
    """examples/mnist-sklearn, which measures itself and needs no more packages than this benchmark."""

    def __init__(self):
        self.model = LogisticRegression(solver="lbfgs", warm_start=True, max_iter=10)
        self.model.classes_ = CLASSES
        self.model.n_features_in_ = PIXELS
        self.model.coef_ = np.zeros((len(CLASSES), PIXELS))
        self.model.intercept_ = np.zeros(len(CLASSES))

    def set_model_data(self):
        (fd,) = entrance.request()
        with os.fdopen(fd, "rb") as file:
            table = pa.ipc.open_file(file).read_all()
        rows = [np.frombuffer(image, np.uint8) for image in table.column("pixels").to_pylist()]
        images = np.stack(rows) / 255.0
        labels = table.column("label").to_numpy()
        cut = len(labels) * 4 // 5
        self.num_examples = cut
        self.x_test, self.y_test = images[cut:], labels[cut:]
        self.x_train = np.concatenate([images[:cut], np.zeros((len(CLASSES), PIXELS))])
        self.y_train = np.concatenate([labels[:cut], CLASSES])
        self.weights = np.concatenate([np.ones(cut), np.zeros(len(CLASSES))])

    def get_model(self):
        return self.model

    def get_model_parameters(self):
        return [self.model.coef_, self.model.intercept_]

    def set_model_parameters(self, parameters):
        self.model.coef_, self.model.intercept_ = parameters

    def fit_model(self):
        wall, cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(self.x_train, self.y_train, sample_weight=self.weights)
        return self.num_examples, {
            "fit_wall_s": time.perf_counter() - wall,
            "fit_cpu_s": time.process_time() - cpu,
        }

    def evaluate_model(self):
        wall, cpu = time.perf_counter(), time.process_time()
        probabilities = self.model.predict_proba(self.x_test)
        loss = log_loss(self.y_test, probabilities, labels=CLASSES)
        accuracy = accuracy_score(self.y_test, probabilities.argmax(axis=1))
        return float(loss), float(accuracy), len(self.y_test), {
            "evaluate_wall_s": time.perf_counter() - wall,
            "evaluate_cpu_s": time.process_time() - cpu,
        }
'''
_INITIAL = [np.zeros((10, 784)), np.zeros(10)]
_TAG = "mnist"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.virtual", description=__doc__.split("\n")[0])
    parser.add_argument("--learners", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--datasets",
        type=Path,
        default=Settings.from_environment().datasets_dir,
        help="where MNIST is, or will be kept",
    )
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name:
        place = _Place(Path(name), options.learners, options.workers)
        with place.data_server():
            start = time.perf_counter()
            place.put_shards(options.datasets)
            put_s = time.perf_counter() - start
            bare = place.bare_rounds(options.rounds)
            measured = place.federated_rounds(options.rounds)
    report.write(
        {
            "benchmark": "virtual",
            "learners": options.learners,
            "workers": options.workers,
            "rounds": options.rounds,
            "model_bytes": sum(array.nbytes for array in _INITIAL),
            "put_shards_s": put_s,
            **measured,
            "limit": bare,
        },
        options.json,
    )


class _Place:
    """A folder with everything that one training of virtual learners needs."""

    def __init__(self, folder: Path, learners: int, workers: int) -> None:
        self.folder, self.workers = folder, workers
        self.learners = [
            VirtualLearner(f"learner-{slot}", secrets.token_urlsafe(24), seed=slot, site=f"site-{slot}")
            for slot in range(1, learners + 1)
        ]
        self.code = folder / "code"
        self.code.mkdir()
        (self.code / "model_manager.py").write_text(_MODEL_MANAGER)
        with (folder / "initial.safetensors").open("wb") as file:
            write(file.fileno(), Layout.of(_INITIAL), _INITIAL)
        self.access = DataAccess(f"grpc+unix://{folder / 'data.sock'}", secrets.token_urlsafe(32), (_TAG,))

    @contextlib.contextmanager
    def data_server(self) -> Iterator[None]:
        token, ready = self.folder / "data.token", self.folder / "data.ready"
        token.write_text(self.access.token)
        token.chmod(0o600)
        with self._running(
            "flops.data.server",
            *("--root", str(self.folder / "data"), "--ready-file", str(ready)),
            *("--socket", str(self.folder / "data.sock"), "--token-file", str(token)),
        ):
            while not ready.exists():
                time.sleep(0.02)
            yield

    def put_shards(self, datasets: Path) -> None:
        images, labels = _mnist(datasets)
        order = np.random.default_rng(0).permutation(len(labels))
        with DataClient(self.access.location, self.access.token) as client:
            for learner, part in zip(self.learners, np.array_split(order, len(self.learners)), strict=True):
                table = pa.table({"pixels": [images[row].tobytes() for row in part], "label": labels[part]})
                client.put(table, [_TAG], learner.site)

    def bare_rounds(self, rounds: int) -> dict[str, Any]:
        """Rounds of the same requests to as many guests, straight from here: no agent, no aggregator."""
        client = DataClient(self.access.location, self.access.token)

        def shard(site: str) -> list[int]:
            fd = os.memfd_create("data")
            client.write_matching(self.access.tags, site, fd)
            return [fd]

        guests = [
            Guest.start(Room(Path(sys.executable), self.code), threads=1, log=self.folder / f"bare-{number}")
            for number in range(self.workers)
        ]
        seats = [
            guests[place % self.workers].seat(
                place, seed=learner.seed, dataset=functools.partial(shard, learner.site)
            )
            for place, learner in enumerate(self.learners)
        ]
        times: list[float] = []
        own: list[float] = []

        def work(number: int, model_fd: int, round_number: int) -> None:
            mine = seats[number :: self.workers]
            for seat in mine:
                own.extend(_own_s(seat.fit(model_fd, round_number, seed=round_number).metrics, "cpu"))
            for seat in mine:
                own.extend(_own_s(seat.evaluate(model_fd, round_number).metrics, "cpu"))

        with contextlib.ExitStack() as stack:
            stack.callback(client.close)
            for guest in guests:
                stack.enter_context(guest)
            self._in_parallel(lambda number: _load(seats[number :: self.workers]))
            with (self.folder / "initial.safetensors").open("rb") as model:
                for round_number in range(1, rounds + 1):
                    start = time.perf_counter()
                    self._in_parallel(
                        lambda number, round_number=round_number: work(number, model.fileno(), round_number)
                    )
                    times.append(time.perf_counter() - start)
        own_s = sum(own) / rounds
        round_s = statistics.median(times)
        return {
            "round_s_median": round_s,
            "own_ms_per_learner": 1000 * own_s / len(seats),
            "overhead_ms_per_learner": 1000 * (round_s - own_s / self.workers) / len(seats),
        }

    def federated_rounds(self, rounds: int) -> dict[str, Any]:
        """A whole training; times are the aggregator's own, round by round."""
        location = f"grpc+unix://{self.folder / 'aggregator.sock'}"
        count = len(self.learners)
        AggregatorConfig(
            project="p-bench",
            listen=location,
            members={
                learner.learner: Member(learner.token, slot=slot)
                for slot, learner in enumerate(self.learners, start=1)
            },
            initial_model=str(self.folder / "initial.safetensors"),
            state_dir=str(self.folder / "state"),
            plan=Plan(
                rounds=rounds,
                learner_metrics=True,
                min_available_learners=count,
                min_fit_learners=count,
                min_evaluate_learners=count,
                start_deadline_s=1800.0,
            ),
        ).write(self.folder / "aggregator.json")
        AgentConfig(
            project="p-bench",
            aggregator=location,
            python=sys.executable,
            code=str(self.code),
            data=self.access,
            threads=1,
            virtual=tuple(self.learners),
            workers=self.workers,
            log=str(self.folder / "code.out"),
        ).write(self.folder / "agents.json")
        start = time.perf_counter()
        peak: dict[str, int] = {}
        with (
            self._running(
                "flops.federation.aggregator", "--config", str(self.folder / "aggregator.json")
            ) as a,
            self._running("flops.agent", "--config", str(self.folder / "agents.json")) as b,
        ):
            ready_s = 0.0
            spent: dict[int, tuple[float, float, float]] = {}
            while a.poll() is None:
                if not ready_s and any(line["kind"] == "round.started" for line in self._reports()):
                    ready_s = time.perf_counter() - start
                with contextlib.suppress(psutil.Error, OSError, ValueError):
                    workers = psutil.Process(b.pid).children()
                    seen = {
                        "aggregator_peak_rss_bytes": _peak_rss(a.pid),
                        "agent_peak_rss_bytes": _peak_rss(b.pid),
                        "worker_peak_rss_bytes": max(_peak_rss(worker.pid) for worker in workers),
                        "aggregator_threads": psutil.Process(a.pid).num_threads(),
                        "agent_threads": psutil.Process(b.pid).num_threads(),
                        "agent_files": psutil.Process(b.pid).num_fds(),
                        "worker_files": max(worker.num_fds() for worker in workers),
                    }
                    peak = {name: max(value, peak.get(name, 0)) for name, value in seen.items()}
                    done = sum(line["kind"] == "round.finished" for line in self._reports())
                    theirs = sum(_cpu_s(worker.pid) for worker in workers)
                    spent.setdefault(done, (_cpu_s(a.pid), _cpu_s(b.pid), theirs))
                time.sleep(0.25)
            if a.returncode != 0:
                logs = [
                    (self.folder / name).read_text()[-3000:]
                    for name in ("flops.federation.aggregator.log", "flops.agent.log")
                ]
                raise SystemExit("the training failed:\n" + "\n".join(logs))
        finished = [line["data"] for line in self._reports() if line["kind"] == "round.finished"]
        own = {
            clock: [
                sum(sum(_own_s(learner, clock)) for learner in data["learners"].values()) for data in finished
            ]
            for clock in ("cpu", "wall")
        }
        durations = [data["duration_s"] for data in finished]

        def overhead(clock: str) -> list[float]:
            return [
                1000 * (duration - own_s / self.workers) / count
                for duration, own_s in zip(durations, own[clock], strict=True)
            ]

        return {
            "overhead_ms_per_learner": statistics.median(overhead("cpu")),
            "overhead_ms_per_learner_worst_round": max(overhead("cpu")),
            "overhead_ms_per_learner_by_wall_clock": statistics.median(overhead("wall")),
            "own_ms_per_learner": 1000 * statistics.median(own["cpu"]) / count,
            "round_s": durations,
            "participants": [data["participants"] for data in finished],
            "accuracy": [data["metrics"]["accuracy"] for data in finished],
            "start_s": ready_s,
            "overhead_processor_ms_per_learner": (
                sum(_per_learner_ms(spent, place, count) for place in range(3))
                - 1000 * statistics.mean(own["cpu"]) / count
            )
            / (os.cpu_count() or 1),
            "aggregator_cpu_ms_per_learner": _per_learner_ms(spent, 0, count),
            "agent_cpu_ms_per_learner": _per_learner_ms(spent, 1, count),
            "workers_cpu_ms_per_learner": _per_learner_ms(spent, 2, count),
            **peak,
        }

    def _reports(self) -> list[dict[str, Any]]:
        file = self.folder / "state" / "reports.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"]

    @contextlib.contextmanager
    def _running(self, module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _in_parallel(self, work: Any) -> None:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _load(seats: list[Seat]) -> None:
    for seat in seats:
        seat.load()
        seat.load_data()


def _own_s(metrics: Any, clock: str) -> list[float]:
    return [metrics[name] for name in (f"fit_{clock}_s", f"evaluate_{clock}_s") if name in metrics]


def _mnist(datasets: Path) -> tuple[Any, Any]:
    """Images (60000, 784) of bytes, and labels."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(known_dataset("mnist", datasets))
    encoded = table.column("image").combine_chunks().field("bytes")
    images = np.stack([np.asarray(Image.open(io.BytesIO(image.as_py()))).reshape(-1) for image in encoded])
    return images, table.column("label").to_numpy()


def _peak_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _per_learner_ms(spent: dict[int, tuple[float, float, float]], place: int, learners: int) -> float:
    """Processor time of a round, between the first that was seen to its end and the last."""
    seen = sorted(done for done in spent if done >= 1)
    if len(seen) < 2:
        return 0.0
    first, last = seen[0], seen[-1]
    return 1000 * (spent[last][place] - spent[first][place]) / (last - first) / learners


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
