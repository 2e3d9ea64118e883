"""What a round costs beyond the user's own training.

Real agents and workers as processes, the real aggregator, one model of the given size: the fit returns its
parameters. The limit is a raw loopback socket that moves the same bytes.

    python -m benchmarks.rounds --learners 10 --bytes 100000000 --rounds 5 --json -
"""

import argparse
import contextlib
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import loopback, report
from benchmarks.certificates import self_signed
from benchmarks.services import peak_rss, services
from flops.federation import AgentConfig, AggregatorConfig, Member, Plan, Tls
from flops_worker.tensors import Layout, write

_MODEL_MANAGER = '''\
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    """A model that learns nothing: what is measured is everything around it."""

    def set_model_data(self) -> None:
        pass

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters) -> None:
        self.parameters = parameters

    def fit_model(self) -> int:
        return 1

    def evaluate_model(self):
        return 0.5, 0.5, 1
'''


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.rounds", description=__doc__.split("\n")[0])
    parser.add_argument("--learners", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=10_000, help="size of the model (float32 parameters)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-tls", action="store_true", help="leave out the second run over TLS")
    parser.add_argument("--no-evaluation", action="store_true", help="leave out the runs with evaluation")
    report.add_json_option(parser)
    options = parser.parse_args()
    learners, nbytes, rounds = options.learners, options.bytes // 4 * 4, options.rounds

    limit_s = loopback.seconds(learners, nbytes)
    result: dict[str, Any] = {
        "benchmark": "rounds",
        "learners": learners,
        "bytes": nbytes,
        "rounds": rounds,
    }
    plain = measure(learners, nbytes, rounds, evaluate=False, tls=False)
    limit_s = min(limit_s, loopback.seconds(learners, nbytes))
    result |= {
        "round_s_median": plain["round_s_median"],
        "round_s_min": plain["round_s_min"],
        "round_s_max": plain["round_s_max"],
        "loopback_s": limit_s,
        "ratio": plain["round_s_median"] / limit_s,
        "aggregator_peak_rss_bytes": plain["aggregator_peak_rss_bytes"],
        "learner_rss_bytes": plain["learner_rss_bytes"],
        "memory_used_bytes": plain["memory_used_bytes"],
        "start_s": plain["start_s"],
    }
    if not options.no_evaluation:
        evaluated = measure(learners, nbytes, rounds, evaluate=True, tls=False)
        result["round_with_evaluation_s_median"] = evaluated["round_s_median"]
    if not options.no_tls:
        limit_s = min(limit_s, loopback.seconds(learners, nbytes))
        secured = measure(learners, nbytes, rounds, evaluate=False, tls=True)
        result["tls"] = {**secured, "ratio": secured["round_s_median"] / limit_s}
    report.write(result, options.json)


def measure(learners: int, nbytes: int, rounds: int, *, evaluate: bool, tls: bool) -> dict[str, Any]:
    """One training with that many agents and workers; times are the aggregator's own, round by round."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name:
        folder = Path(name)
        used_before = psutil.virtual_memory().used
        start = time.perf_counter()
        with _federation(folder, learners, nbytes, rounds, evaluate, tls) as (aggregator, agents):
            peak, learner_rss, used = 0, 0, 0
            started = 0.0
            while aggregator.poll() is None:
                with contextlib.suppress(OSError, psutil.Error):
                    peak = max(peak, peak_rss(aggregator.pid))
                    if (folder / "state" / "state.json").exists():
                        started = started or time.perf_counter() - start
                        learner_rss = max(learner_rss, _family_rss(agents[0].pid))
                        used = max(used, psutil.virtual_memory().used - used_before)
                time.sleep(0.1 if learners * nbytes > 1 << 24 else 0.5)
            if aggregator.returncode != 0:
                raise SystemExit(f"the aggregator failed: {(folder / 'aggregator.log').read_text()[-2000:]}")
        lines = [json.loads(line) for line in (folder / "state" / "reports.jsonl").read_text().splitlines()]
    finished = [line for line in lines if line["kind"] == "round.finished"]
    # The first round warms caches, buffers and files; it is the start of a project, not its pace.
    times = [line["data"]["duration_s"] for line in finished[1:]]
    return {
        "round_s_median": statistics.median(times),
        "round_s_min": min(times),
        "round_s_max": max(times),
        "aggregator_peak_rss_bytes": peak,
        "learner_rss_bytes": learner_rss,
        "memory_used_bytes": used,
        "start_s": started,
    }


@contextlib.contextmanager
def _federation(
    folder: Path, learners: int, nbytes: int, rounds: int, evaluate: bool, tls: bool
) -> Iterator[tuple[subprocess.Popen[bytes], list[subprocess.Popen[bytes]]]]:
    code = folder / "code"
    code.mkdir()
    (code / "model_manager.py").write_text(_MODEL_MANAGER)
    arrays = [np.random.default_rng(0).standard_normal(nbytes // 4, np.float32)]
    with (folder / "initial.safetensors").open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)
    tokens = {f"learner-{number:04}": secrets.token_urlsafe(24) for number in range(learners)}
    server_tls = client_tls = None
    listen = f"grpc+unix://{folder / 'aggregator.sock'}"
    if tls:
        cert, key = self_signed(folder)
        listen = f"grpc+tls://127.0.0.1:{_free_port()}"
        server_tls, client_tls = Tls(cert=str(cert), key=str(key)), Tls(ca=str(cert))
    AggregatorConfig(
        project="p-bench",
        listen=listen,
        members={name: Member(token) for name, token in tokens.items()},
        initial_model=str(folder / "initial.safetensors"),
        state_dir=str(folder / "state"),
        plan=Plan(
            rounds=rounds + 1,
            fraction_evaluate=1.0 if evaluate else 0.0,
            min_available_learners=learners,
            min_fit_learners=learners,
            start_deadline_s=600.0,
        ),
        tls=server_tls,
    ).write(folder / "aggregator.json")
    with services(folder) as running:
        agents = []
        for name, token in tokens.items():
            AgentConfig(
                project="p-bench",
                learner=name,
                token=token,
                aggregator=listen,
                python=sys.executable,
                code=str(code),
                tls=client_tls,
                threads=1,
            ).write(folder / f"{name}.json")
            agents.append(running.start("flops.agent", name))
        # The aggregator comes last: its agents are up and trying by then, as after a restart.
        yield running.start("flops.federation.aggregator", "aggregator"), agents


def _family_rss(pid: int) -> int:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
