"""Aggregator, agents and workers as the processes they are in production, and one of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.federation import AgentConfig, AggregatorConfig, Link, Member, Plan, ReportTo
from flops.federation.tally import read_tally
from flops_worker.tensors import Layout, read_layout, views, write

MODEL_MANAGER = '''\
import os
import time

import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    """Random steps from the seeded generators: any repetition of a round shows in the bits."""

    def __init__(self):
        self.parameters = [np.zeros((ROWS, 40), np.float32), np.zeros(7)]
        self.rounds = 0

    def set_model_data(self):
        pass

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        self.rounds += 1
        time.sleep(0.05)
        self.parameters = [p + np.random.standard_normal(p.shape).astype(p.dtype) for p in self.parameters]
        FAULT
        return 10

    def evaluate_model(self):
        return float(abs(self.parameters[0]).mean()), 0.5, 10
'''


class Run:
    """One training as processes; everything is ended with the test."""

    def __init__(
        self,
        folder: Path,
        rounds: int,
        faults: dict[str, str] | None = None,
        rows: int = 50,
        cycles: int | None = None,
        **plan: Any,
    ) -> None:
        """Args: cycles makes it a hierarchy of two clusters, of ``rounds`` rounds a cycle."""
        self.folder = folder
        folder.mkdir()
        arrays: list[Any] = [np.zeros((rows, 40), np.float32), np.zeros(7)]
        with (folder / "initial.safetensors").open("wb") as file:
            write(file.fileno(), Layout.of(arrays), arrays)
        names = ["l-0", "l-1", "l-2"]
        location = f"grpc+unix://{folder / 'a.sock'}"
        defaults = {"min_available_learners": 3, "min_fit_learners": 3, "min_evaluate_learners": 3}
        self.aggregator_config = AggregatorConfig(
            project="p-test",
            listen=location,
            members={name: Member(f"token-{name}") for name in names},
            initial_model=str(folder / "initial.safetensors"),
            state_dir=str(folder / "state"),
            plan=Plan(**{"rounds": rounds, "start_deadline_s": 60.0, **defaults, **plan}),
        )
        self.processes: list[subprocess.Popen[bytes]] = []
        self.agents = {}
        self.clusters = {}
        listens_for = dict.fromkeys(names, location)
        if cycles is not None:
            inner = self.aggregator_config
            least: dict[str, Any] = dict.fromkeys(defaults, 1)
            members = {f"c-{number}": Member(f"token-c-{number}", kind="cluster") for number in (0, 1)}
            for name, learners in (("c-0", names[:1]), ("c-1", names[1:])):
                listens_for |= dict.fromkeys(learners, f"grpc+unix://{folder / name}.sock")
                replace(
                    inner,
                    listen=f"grpc+unix://{folder / name}.sock",
                    members={learner: inner.members[learner] for learner in learners},
                    state_dir=str(folder / f"state-{name}"),
                    plan=replace(inner.plan, cycles=cycles, **least),
                    parent=Link(location, name, members[name].token),
                ).write(folder / f"{name}.json")
                self.clusters[name] = self.start_cluster(name)
            plan_of_root = replace(inner.plan, rounds=cycles, cycles=cycles, **least)
            self.aggregator_config = replace(inner, members=members, plan=plan_of_root)
        self.aggregator_config.write(folder / "aggregator.json")
        for name in names:
            code = folder / f"code-{name}"
            code.mkdir()
            fault = (faults or {}).get(name, "pass")
            (code / "model_manager.py").write_text(
                MODEL_MANAGER.replace("FAULT", fault).replace("ROWS", str(rows))
            )
            AgentConfig(
                project="p-test",
                learner=name,
                token=f"token-{name}",
                aggregator=listens_for[name],
                python=sys.executable,
                code=str(code),
                threads=1,
                log=str(folder / f"{name}.out"),
                tally=str(folder / f"{name}.tally"),
            ).write(folder / f"{name}.json")
            self.agents[name] = self._start("flops.agent", name)
        self.aggregator = self.start_aggregator()

    def start_aggregator(self) -> "subprocess.Popen[bytes]":
        return self._start("flops.federation.aggregator", "aggregator")

    def start_cluster(self, name: str) -> "subprocess.Popen[bytes]":
        return self._start("flops.federation.aggregator", name)

    def _start(self, module: str, name: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", str(self.folder / f"{name}.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def reports(self, kind: str, state: str = "state") -> list[dict[str, Any]]:
        file = self.folder / state / "reports.jsonl"
        if not file.exists():
            return []
        lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        return [line["data"] for line in lines if line["kind"] == kind]

    def wait_for_round(self, number: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.reports("round.finished")) < number:
            assert time.monotonic() < deadline, (self.folder / "aggregator.log").read_text()
            assert self.aggregator.poll() is None, (self.folder / "aggregator.log").read_text()
            time.sleep(0.01)

    def result(self, timeout_s: float = 120.0) -> list[bytes]:
        code = self.aggregator.wait(timeout_s)
        assert code == 0, (self.folder / "aggregator.log").read_text()
        path = self.folder / "state" / f"global-{self.aggregator_config.plan.rounds}.safetensors"
        with path.open("rb") as file:
            layout, offset = read_layout(file.fileno())
        return [array.tobytes() for array in views(layout, path.read_bytes()[offset:])]

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    runs: list[Run] = []

    def _run(rounds: int = 3, **options: Any) -> Run:
        runs.append(Run(tmp_path / str(len(runs)), rounds, **options))
        return runs[-1]

    yield _run
    for one in runs:
        one.close()


def test_agents_end_by_themselves_when_the_training_is_over(run: Any) -> None:
    training = run(rounds=2)
    training.result()
    assert [agent.wait(10) for agent in training.agents.values()] == [0, 0, 0]
    assert len(training.reports("round.finished")) == 2


def test_an_agent_counts_its_rounds_and_what_left_the_machine(run: Any) -> None:
    training = run(rounds=2, rows=5000)  # updates above 64 KiB travel in parts
    training.result()
    assert [agent.wait(10) for agent in training.agents.values()] == [0, 0, 0]
    model_bytes = 5000 * 40 * 4 + 7 * 8
    for name in training.agents:
        counts = read_tally(training.folder / f"{name}.tally")
        assert (counts.rounds, counts.evaluations) == (2, 2)
        assert 2 * model_bytes < counts.bytes_out < 2 * model_bytes + 20_000
        assert counts.bytes_in > 2 * model_bytes


@pytest.mark.slow
def test_a_killed_aggregator_goes_on_and_ends_with_the_same_bits(run: Any) -> None:
    undisturbed = run(rounds=8).result()
    training = run(rounds=8)
    for committed in (2, 5):
        training.wait_for_round(committed)
        training.aggregator.kill()
        training.aggregator.wait(10)
        training.aggregator = training.start_aggregator()
    assert training.result() == undisturbed
    assert [data["round"] for data in training.reports("round.finished")] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FedAsync", "FedBuff", "FedAT"])
def test_a_killed_aggregator_of_an_asynchronous_training_loses_no_commit(run: Any, strategy: str) -> None:
    slow = {"l-2": "time.sleep(1.0)"}
    training = run(
        rounds=8,
        rows=5000,
        strategy=strategy,
        faults=slow,
        min_available_learners=2,
        min_fit_learners=2,
        min_evaluate_learners=2,
    )
    for committed in (2, 5):
        training.wait_for_round(committed)
        training.aggregator.kill()
        training.aggregator.wait(10)
        training.aggregator = training.start_aggregator()
    training.result()
    done = training.reports("round.finished")
    assert [data["round"] for data in done] == list(range(1, 9))
    assert done[-1]["evaluated"] >= 2
    versions = [data["version"] for data in done]
    assert versions == sorted(set(versions))
    assert [agent.wait(10) for agent in training.agents.values()] == [0, 0, 0]


@pytest.mark.slow
def test_killed_clusters_go_on_within_their_cycle_and_end_with_the_same_bits(run: Any) -> None:
    undisturbed = run(rounds=4, cycles=3).result()
    training = run(rounds=4, cycles=3)
    for cluster, round_number in (("c-0", 2), ("c-1", 5), ("c-1", 7), ("root", 8), ("c-0", 10)):
        state = "state-c-1" if cluster == "root" else f"state-{cluster}"
        deadline = time.monotonic() + 60
        while not any(data["round"] >= round_number for data in training.reports("cluster.round", state)):
            assert time.monotonic() < deadline, (training.folder / "c-1.log").read_text()
            time.sleep(0.01)
        if cluster == "root":
            training.aggregator.kill()
            training.aggregator.wait(10)
            training.aggregator = training.start_aggregator()
        else:
            training.clusters[cluster].kill()
            training.clusters[cluster].wait(10)
            training.clusters[cluster] = training.start_cluster(cluster)
    assert training.result() == undisturbed
    assert [data["round"] for data in training.reports("round.finished")] == [1, 2, 3]
    for cluster in ("c-0", "c-1"):
        rounds = [data["round"] for data in training.reports("cluster.round", f"state-{cluster}")]
        assert rounds == list(range(1, 13))
        assert training.clusters[cluster].wait(10) == 0


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        ("raise ValueError('bad batch')", 1, "ValueError: bad batch"),
        ("raise SystemExit(3)", 1, "SystemExit"),
        ("os._exit(9)", 1, "exit code 9"),
        ("os.kill(os.getpid(), 11)", 1, "SIGSEGV"),
    ],
)
def test_whatever_user_code_does_ends_only_its_learners_part(
    run: Any, fault: str, exit_code: int, words: str
) -> None:
    few = {"min_available_learners": 2, "min_fit_learners": 2, "min_evaluate_learners": 2}
    training = run(rounds=2, faults={"l-1": fault}, **few)
    training.result()
    assert training.agents["l-1"].wait(10) == exit_code
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert left["learner"] == "l-1"
    assert words in left["reason"]
    assert [data["participants"] for data in training.reports("round.finished")] == [2, 2]


def test_a_killed_agent_takes_its_worker_along_and_the_round_goes_on(run: Any) -> None:
    few = {"min_available_learners": 2, "min_fit_learners": 2, "min_evaluate_learners": 2}
    training = run(rounds=40, round_deadline_s=30.0, **few)
    training.wait_for_round(2)
    agent = training.agents["l-2"]
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert children
    agent.kill()
    agent.wait(10)
    training.result()
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert training.reports("round.finished")[-1]["participants"] == 2


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedMedian"])
def test_seeded_runs_end_with_the_same_bits_whatever_the_order_of_arrival(run: Any, strategy: str) -> None:
    """Updates above 64 KiB, so they are spooled; the learners take different times in each run."""
    orders = (["0", "0.15", "0.3"], ["0.3", "0", "0.15"])
    models = []
    for delays in orders:
        faults = {f"l-{number}": f"time.sleep({delay})" for number, delay in enumerate(delays)}
        models.append(run(rounds=2, rows=5000, faults=faults, strategy=strategy, seed=11).result())
    assert models[0] == models[1]
    assert len({models[0][0][i : i + 4] for i in range(0, 4000, 4)}) > 900


def _worker_of(agent: "subprocess.Popen[bytes]") -> list[str]:
    return Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()


def _wait_until(what: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


FITS_FOR_LONG = "open('fitting', 'w').close(); time.sleep(60)"


def _is_fitting(training: Run, name: str) -> bool:
    return (training.folder / f"code-{name}" / "fitting").exists()


def test_an_agent_that_is_told_to_end_while_it_trains_leaves_nothing_behind(run: Any, tmp_path: Path) -> None:
    training = run(rounds=1, faults={"l-1": FITS_FOR_LONG})
    _wait_until(lambda: _is_fitting(training, "l-1"))
    agent = training.agents["l-1"]
    children = _worker_of(agent)
    homes = [
        Path(value.split("=", 1)[1])
        for child in children
        for value in Path(f"/proc/{child}/environ").read_text().split("\0")
        if value.startswith("HOME=")
    ]
    assert children
    assert homes
    agent.terminate()
    assert agent.wait(5) == 143
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not any(home.exists() for home in homes)


def test_agents_end_with_the_project_even_while_they_train(run: Any) -> None:
    few = {"min_available_learners": 2, "min_fit_learners": 2, "min_evaluate_learners": 1}
    training = run(rounds=1, faults={"l-1": FITS_FOR_LONG}, round_deadline_s=2.0, **few)
    training.result()
    assert _is_fitting(training, "l-1")
    assert training.agents["l-1"].wait(5) == 0


def test_a_training_that_takes_longer_than_a_cut_counts(run: Any) -> None:
    """The agent connects again while the user's code goes on, so nobody takes it for gone."""
    fault = "open('fitting', 'w').close(); time.sleep(5)"
    training = run(rounds=1, faults={"l-1": fault}, start_deadline_s=4.0)
    _wait_until(lambda: _is_fitting(training, "l-1"))
    training.aggregator.kill()
    training.aggregator.wait(10)
    training.aggregator = training.start_aggregator()
    training.result()
    assert training.reports("round.finished")[0]["participants"] == 3
    assert (training.folder / "l-1.log").read_text().count("the aggregator is away") >= 1


def test_a_learner_whose_code_failed_during_a_cut_says_so_afterwards(run: Any) -> None:
    fault = (
        "open('fitting', 'w').close()\n"
        "        while not os.path.exists('cut'): time.sleep(0.01)\n"
        "        os._exit(9)"
    )
    few = {"min_available_learners": 2, "min_fit_learners": 2, "min_evaluate_learners": 2}
    training = run(rounds=1, faults={"l-1": fault}, **few)
    _wait_until(lambda: _is_fitting(training, "l-1"))
    training.aggregator.kill()
    training.aggregator.wait(10)
    children = _worker_of(training.agents["l-1"])
    (training.folder / "code-l-1" / "cut").touch()
    _wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    training.aggregator = training.start_aggregator()
    training.result()
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert "exit code 9" in left["reason"]
    assert training.agents["l-1"].wait(10) == 1


def test_an_update_that_user_code_cuts_short_ends_only_its_learners_part(run: Any) -> None:
    """Under a mapping it would be a SIGBUS of the agent."""
    fault = (
        "import glob, threading\n"
        "        files = glob.glob('/proc/self/fd/*')\n"
        "        (name,) = [file for file in files if 'update' in os.path.realpath(file)]\n"
        "        update = os.open(name, os.O_RDWR)\n"
        "        def cut():\n"
        "            while True:\n"
        "                if os.fstat(update).st_size > 5000:\n"
        "                    time.sleep(0.002)\n"
        "                    os.truncate(update, 5000)\n"
        "        threading.Thread(target=cut, daemon=True).start()"
    )
    few = {"min_available_learners": 2, "min_fit_learners": 2, "min_evaluate_learners": 2}
    training = run(rounds=1, rows=20_000, faults={"l-1": fault}, **few)
    training.result()
    assert training.agents["l-1"].wait(10) == 1
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert left["learner"] == "l-1"
    assert "fit_model" in left["reason"]


def test_data_that_cannot_be_had_are_the_reason_that_is_shown(run: Any) -> None:
    training = run(
        rounds=1,
        faults={"l-1": "from flops_utils.ml_repo_building_blocks import load_dataset; load_dataset()"},
    )
    assert training.aggregator.wait(60) == 1
    (failed,) = training.reports("training.failed")
    assert "l-1" in failed["reason"]
    assert training.agents["l-1"].wait(10) == 1


def test_an_aggregator_that_cannot_go_on_says_so_and_ends(run: Any) -> None:
    training = run(rounds=50)
    training.wait_for_round(1)
    # The state folder vanishes: whatever is raised then, the process ends and does not hang.
    for path in (training.folder / "state").glob("*.safetensors"):
        path.unlink()
    (training.folder / "state").rename(training.folder / "away")
    assert training.aggregator.wait(20) == 1
    lines = (training.folder / "away" / "reports.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["kind"] == "training.failed"


def test_agents_and_aggregator_start_light() -> None:
    """An agent must not load flwr (66 MB), nor the public face of the room anything at all."""
    code = (
        "import sys; import flops.{0}; "
        "print(sorted(m for m in ('flwr', 'pyarrow', 'mlflow') if m in sys.modules))"
    )
    loaded = [
        subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        ).stdout.strip()
        for module in ("federation", "agent.__main__")
    ]
    assert loaded == ["[]", "['pyarrow']"]


def test_reports_reach_the_manager_once_and_in_order_over_its_restart(tmp_path: Path) -> None:
    """The manager's end is a real HTTP server on a Unix socket that goes away and comes back."""
    import http.server
    import socketserver
    import threading

    from flops.core.clock import SystemClock
    from flops.core.events import EventKind
    from flops.federation.reports import Reporter

    received: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Authorization"] == "Bearer secret"
            known = received[-1]["seq"] if received else 0
            received.extend(report for report in body["reports"] if report["seq"] > known)
            answer = json.dumps({"accepted": received[-1]["seq"]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    class UnixServer(socketserver.UnixStreamServer):
        pass

    socket_path = str(tmp_path / "m.sock")
    reporter = Reporter(
        tmp_path / "reports.jsonl", ReportTo("secret", "/reports", socket_path), SystemClock()
    )
    reporter.report(EventKind.ROUND_STARTED, round=1)
    for number in (2, 3):
        with UnixServer(socket_path, Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            assert reporter.flush(10)
            server.shutdown()
            thread.join()
        Path(socket_path).unlink()
        reporter.report(EventKind.ROUND_STARTED, round=number)
    reporter.close()
    with (tmp_path / "reports.jsonl").open("a") as file:
        file.write('{"seq": 4, "torn')
    again = Reporter(tmp_path / "reports.jsonl", ReportTo("secret", "/reports", socket_path), SystemClock())
    with UnixServer(socket_path, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        again.report(EventKind.ROUND_STARTED, round=4)
        assert again.flush(10)
        server.shutdown()
        thread.join()
    again.close()
    assert [(report["seq"], report["data"]["round"]) for report in received] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
    ]
