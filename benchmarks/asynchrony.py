"""Asynchronous against synchronous training with one learner ten times slower: time to the same accuracy.

Six learners share the handwritten digits of scikit-learn, unevenly by label (Dirichlet). They are real agents
and workers as processes; their code is multinomial logistic regression in numpy, and then it sleeps: what a
learner takes is decided by that, not by the processors of this machine. Each evaluates on the same test
images, so every evaluation is the accuracy of the global model, whoever made it.

Two limits stand beside it, measured in the same run with the synchronous FedAvg: what the quick learners
take alone (without the data of the slow one), and what all six would take if none were slow.

    python -m benchmarks.asynchrony --json -
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks import report
from benchmarks.services import services
from flops.federation import AgentConfig, AggregatorConfig, Member, Plan
from flops_worker.tensors import Layout, write

LEARNERS, ALPHA = 6, 1.0
SLOW = f"learner-{LEARNERS - 1}"
QUICK_S, SLOW_S = 0.05, 0.5
_LONGEST_S = 12.0
"""Whoever has not reached the target by then does not."""

_MODEL_MANAGER = '''\
import json
import time

import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    """Softmax regression by stochastic gradient descent; it takes as long as settings.json says."""

    def set_model_data(self) -> None:
        data = np.load("data.npz")
        self.x, self.y, self.x_test, self.y_test = (data[name] for name in ("x", "y", "x_test", "y_test"))
        with open("settings.json") as file:
            self.settings = json.load(file)
        self.parameters = [np.zeros((64, 10), np.float32), np.zeros(10, np.float32)]

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters) -> None:
        self.parameters = [parameter.copy() for parameter in parameters]

    def probabilities(self, x):
        scores = x @ self.parameters[0] + self.parameters[1]
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)

    def fit_model(self) -> int:
        begin = time.monotonic()
        weights, bias = self.parameters
        order = np.random.permutation(len(self.y))
        for batch in np.array_split(order, max(1, len(order) // 16)):
            error = self.probabilities(self.x[batch])
            error[np.arange(len(batch)), self.y[batch]] -= 1.0
            weights -= self.settings["rate"] * (self.x[batch].T @ error) / len(batch)
            bias -= self.settings["rate"] * error.mean(axis=0)
        time.sleep(max(0.0, self.settings["seconds"] - (time.monotonic() - begin)))
        return len(self.y)

    def evaluate_model(self):
        right = self.probabilities(self.x_test)[np.arange(len(self.y_test)), self.y_test]
        best = self.probabilities(self.x_test).argmax(axis=1)
        return float(-np.log(right + 1e-9).mean()), float((best == self.y_test).mean()), len(self.y_test)
'''


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    strategy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = True
    """Whether the last learner is the slow one."""
    learners: int = LEARNERS


SETTINGS = {
    "synchronous": Setting("FedAvg"),
    "FedAsync": Setting("FedAsync", {"alpha": 0.6}),
    "FedBuff": Setting("FedBuff", {"buffer_size": 3}),
    "FedAT": Setting("FedAT", {"tiers": 2}),
    "quick learners alone, synchronous": Setting("FedAvg", slow=False, learners=LEARNERS - 1),
    "nobody slow, synchronous": Setting("FedAvg", slow=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.asynchrony", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.93, help="accuracy to reach")
    parser.add_argument("--rate", type=float, default=0.3, help="learning rate of the learners")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    report.add_json_option(parser)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.only:
        runs = [measure(SETTINGS[name], seed, options.target, options.rate) for seed in range(options.seeds)]
        reached = [run["seconds"] for run in runs if run["seconds"] is not None]
        results[name] = {
            "seconds_median": statistics.median(reached) if len(reached) == len(runs) else None,
            "rounds_median": statistics.median(run["rounds"] for run in runs),
            "updates_median": statistics.median(run["updates"] for run in runs),
            "updates_of_the_slow_median": statistics.median(run["updates_of_the_slow"] for run in runs),
            "mean_staleness_median": statistics.median(run["mean_staleness"] for run in runs),
            "best_accuracy_median": statistics.median(run["accuracy"] for run in runs),
            "runs": runs,
        }
        print(f"{name}: {results[name]['seconds_median']} s", file=sys.stderr)
    base = results.get("synchronous", {}).get("seconds_median")
    for result in results.values():
        if base and result["seconds_median"]:
            result["times_faster_than_synchronous"] = round(base / result["seconds_median"], 2)
    report.write(
        {
            "benchmark": "asynchrony",
            "learners": LEARNERS,
            "quick_s": QUICK_S,
            "slow_s": SLOW_S,
            "alpha": ALPHA,
            "target_accuracy": options.target,
            "seeds": options.seeds,
            "settings": results,
        },
        options.json,
    )


def measure(setting: Setting, seed: int, target: float, rate: float) -> dict[str, Any]:
    """One training until the target; time counts from the first task to the report of the accuracy."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name:
        folder = Path(name)
        with _federation(folder, setting, seed, rate) as aggregator:
            start, done = None, []
            while aggregator.poll() is None:
                lines = _lines(folder / "state" / "reports.jsonl")
                begun = [line["time"] for line in lines if line["kind"] == "round.started"]
                start = begun[0] if begun else None
                done = [line for line in lines if line["kind"] == "round.finished"]
                if done and max(_accuracy(line) for line in done) >= target:
                    break
                if start is not None and time.time() - start > _LONGEST_S:
                    break
                time.sleep(0.02)
            else:
                raise SystemExit(f"the aggregator ended: {(folder / 'aggregator.log').read_text()[-2000:]}")
    reached = [line["time"] for line in done if _accuracy(line) >= target]
    learners = [
        update["learner"]
        for line in done
        for update in line["data"].get("updates", [{"learner": name} for name in line["data"]["fit_s"]])
    ]
    staleness = [u["staleness"] for line in done for u in line["data"].get("updates", [])]
    assert start is not None
    return {
        "seconds": round(reached[0] - start, 3) if reached else None,
        "rounds": len(done),
        "updates": len(learners),
        "updates_of_the_slow": learners.count(SLOW) if setting.slow else 0,
        "mean_staleness": round(statistics.mean(staleness), 2) if staleness else 0.0,
        "accuracy": round(max(map(_accuracy, done), default=0.0), 4),
    }


def _accuracy(line: Mapping[str, Any]) -> float:
    return float(line["data"]["metrics"].get("accuracy", 0.0))


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n"]


def _data(seed: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Each learner's training images, and the test images that all have."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    x, y = (digits.data[order] / 16.0).astype(np.float32), digits.target[order]
    test, train = slice(0, 500), slice(500, None)
    x_train, y_train = x[train], y[train]
    owner = np.empty(len(y_train), int)
    for label in range(10):
        places = np.flatnonzero(y_train == label)
        owner[places] = rng.choice(LEARNERS, len(places), p=rng.dirichlet([ALPHA] * LEARNERS))
    return [
        {"x": x_train[owner == number], "y": y_train[owner == number], "x_test": x[test], "y_test": y[test]}
        for number in range(LEARNERS)
    ]


@contextlib.contextmanager
def _federation(folder: Path, setting: Setting, seed: int, rate: float) -> Iterator[subprocess.Popen[bytes]]:
    arrays: list[Any] = [np.zeros((64, 10), np.float32), np.zeros(10, np.float32)]
    with (folder / "initial.safetensors").open("wb") as file:
        write(file.fileno(), Layout.of(arrays), arrays)
    tokens = {f"learner-{number}": secrets.token_urlsafe(24) for number in range(setting.learners)}
    listen = f"grpc+unix://{folder / 'aggregator.sock'}"
    AggregatorConfig(
        project="p-bench",
        listen=listen,
        members={name: Member(token) for name, token in tokens.items()},
        initial_model=str(folder / "initial.safetensors"),
        state_dir=str(folder / "state"),
        plan=Plan(
            rounds=10_000,
            strategy=setting.strategy,
            strategy_parameters=setting.parameters,
            min_available_learners=setting.learners,
            min_fit_learners=setting.learners,
            start_deadline_s=120.0,
            seed=seed,
        ),
    ).write(folder / "aggregator.json")
    with services(folder) as running:
        for (name, token), data in zip(tokens.items(), _data(seed), strict=False):
            code = folder / f"code-{name}"
            code.mkdir()
            (code / "model_manager.py").write_text(_MODEL_MANAGER)
            np.savez(code / "data.npz", **data)  # type: ignore[arg-type]
            slow = setting.slow and name == SLOW
            settings = {"seconds": SLOW_S if slow else QUICK_S, "rate": rate}
            (code / "settings.json").write_text(json.dumps(settings))
            AgentConfig(
                project="p-bench",
                learner=name,
                token=token,
                aggregator=listen,
                python=sys.executable,
                code=str(code),
                threads=1,
            ).write(folder / f"{name}.json")
            running.start("flops.agent", name)
        yield running.start("flops.federation.aggregator", "aggregator")


if __name__ == "__main__":
    main()
