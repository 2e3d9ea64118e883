"""Rounds to an accuracy on real MNIST, beside McMahan et al. 2017, and strategies beside each other.

100 learners, of which 10 train in a round, with the networks of the paper (`examples/mnist-pytorch`).
Accuracy is that of the global model on MNIST's 10,000 test images, which lie spread over the learners.
Learning curves are read as in the paper (`benchmarks.federated.rounds_to`). The oracle beside each setting is
the same training in one plain loop without FLOps (`benchmarks.plain_fedavg`) on the same partition, measured
in the same run.

    python -m benchmarks.convergence --json -
    python -m benchmarks.convergence --only 2nn-iid --learning-rates 0.05 0.1 0.2 --oracle-only --json -

Source:
    McMahan et al. 2017, arXiv:1602.05629, Tables 1 and 2, column C = 0.1.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.federated import Flops, flops, load_mnist, rounds_to, say
from flops.data import dirichlet, iid, shards

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ROOT / "examples" / "mnist-pytorch"
LEARNERS, COHORT, ALPHA = 100, 10, 0.1


@dataclass(frozen=True)
class Setting:
    """One training of the paper, or one strategy on skewed data.

    ``paper``: rounds as the paper has them; None: not from there. ``limit``: rounds without the target.
    """

    model: str
    partition: str
    target: float
    epochs: int
    batch_size: int
    learning_rate: float
    limit: int
    paper: int | None = None
    strategy: str = "FedAvg"
    parameters: tuple[tuple[str, float], ...] = ()


SETTINGS = {
    "2nn-iid": Setting("2nn", "iid", 0.97, 1, 10, 0.2, 200, paper=87),
    "2nn-shards": Setting("2nn", "shards", 0.97, 1, 10, 0.1, 1000, paper=664),
    "cnn-e1-iid": Setting("cnn", "iid", 0.99, 1, 10, 0.2, 100, paper=34),
    "cnn-e5-iid": Setting("cnn", "iid", 0.99, 5, 10, 0.1, 60, paper=20),
    "cnn-e1-shards": Setting("cnn", "shards", 0.99, 1, 10, 0.05, 600, paper=350),
    "dirichlet-FedAvg": Setting("2nn", "dirichlet", 0.97, 1, 10, 0.1, 400),
    "dirichlet-FedProx": Setting(
        "2nn", "dirichlet", 0.97, 1, 10, 0.1, 400, strategy="FedProx", parameters=(("proximal_mu", 0.1),)
    ),
    "dirichlet-FedAvgM": Setting(
        "2nn", "dirichlet", 0.97, 1, 10, 0.1, 400, strategy="FedAvgM", parameters=(("server_momentum", 0.7),)
    ),
    "dirichlet-FedAdam": Setting(
        "2nn",
        "dirichlet",
        0.97,
        1,
        10,
        0.1,
        400,
        strategy="FedAdam",
        parameters=(("eta", 0.01), ("tau", 0.001), ("beta_1", 0.9), ("beta_2", 0.99)),
    ),
}
DEFAULT = [name for name in SETTINGS if name != "cnn-e1-shards"]  # hours on two processors


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.convergence", description=__doc__.split("\n")[0])
    parser.add_argument("--home", type=Path, help="a FLOPS_HOME to use and leave; default: a temporary one")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=DEFAULT)
    parser.add_argument("--learning-rates", nargs="*", type=float, help="try these instead of the tuned one")
    parser.add_argument("--limit", type=int, help="at most so many rounds")
    parser.add_argument("--no-oracle", action="store_true", help="leave out the plain loop")
    parser.add_argument("--oracle-only", action="store_true", help="the plain loop alone")
    parser.add_argument("--seed", type=int, default=0)
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-convergence-") as folder, flops(options.home) as flops_:
        python = _environment(flops_)
        results: dict[str, Any] = {}
        for name in options.only:
            setting = SETTINGS[name]
            for rate in options.learning_rates or [setting.learning_rate]:
                tried = replace(setting, learning_rate=rate, limit=options.limit or setting.limit)
                key = name if rate == setting.learning_rate else f"{name}-lr{rate:g}"
                results[key] = _measure(flops_, key, tried, python, Path(folder), options)
    report.write(
        {
            "benchmark": "convergence",
            "learners": LEARNERS,
            "cohort": COHORT,
            "alpha": ALPHA,
            "seed": options.seed,
            "source": "McMahan et al. 2017, arXiv:1602.05629, Tables 1 and 2, C = 0.1",
            "settings": results,
        },
        options.json,
    )


def _measure(
    flops_: Flops, name: str, setting: Setting, python: str, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    result: dict[str, Any] = {**asdict(setting), "parameters": dict(setting.parameters)}
    if not options.oracle_only:
        started = time.perf_counter()
        outcome = flops_.train(_spec(name, setting, folder, options.seed), setting.target)
        result |= {
            "rounds": outcome.rounds_to(setting.target),
            "best_accuracy": max(outcome.accuracies, default=None),
            "ran_rounds": len(outcome.accuracies),
            "seconds": round(time.perf_counter() - started, 1),
            "round_s": round(float(np.median(outcome.round_s)), 3) if outcome.round_s else None,
            "fit_s": round(float(np.median(outcome.fit_s)), 3) if outcome.fit_s else None,
            "state": outcome.state,
            "reason": outcome.reason,
            "accuracies": [round(accuracy, 4) for accuracy in outcome.accuracies],
        }
    if setting.strategy == "FedAvg" and not options.no_oracle:
        started = time.perf_counter()
        accuracies = _oracle(flops_, setting, python, folder, options.seed)
        result["oracle"] = {
            "rounds": rounds_to(accuracies, setting.target),
            "best_accuracy": max(accuracies),
            "ran_rounds": len(accuracies),
            "seconds": round(time.perf_counter() - started, 1),
            "accuracies": [round(accuracy, 4) for accuracy in accuracies],
        }
    say(f"{name}: {result.get('rounds')} rounds, oracle {result.get('oracle', {}).get('rounds')}")
    return result


def _spec(name: str, setting: Setting, folder: Path, seed: int) -> dict[str, Any]:
    code = folder / name
    shutil.copytree(REPOSITORY, code, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "settings.json").write_text(json.dumps(_settings(setting)))
    return {
        "repo": str(code),
        "name": f"convergence-{name}",
        "training": {
            "rounds": setting.limit,
            "learners": LEARNERS,
            "virtual": True,
            "fraction_fit": COHORT / LEARNERS,
            "min_available_learners": LEARNERS,
            "min_fit_learners": COHORT,
            "strategy": {"name": setting.strategy, "parameters": dict(setting.parameters)},
            "start_deadline_s": 900.0,
            "seed": seed,
        },
        "data": {
            "mock": {
                "dataset": "mnist",
                "partition": setting.partition,
                "test_split": True,
                "seed": seed,
                **({"alpha": ALPHA} if setting.partition == "dirichlet" else {}),
            }
        },
        "selection": {"metric": "accuracy"},
    }


def _settings(setting: Setting) -> dict[str, Any]:
    return {
        "model": setting.model,
        "epochs": setting.epochs,
        "batch_size": setting.batch_size,
        "learning_rate": setting.learning_rate,
    }


def _oracle(flops_: Flops, setting: Setting, python: str, folder: Path, seed: int) -> list[float]:
    images, labels = load_mnist(flops_.settings.datasets_dir, "train")
    test_images, test_labels = load_mnist(flops_.settings.datasets_dir, "test")
    if setting.partition == "iid":
        parts = iid(len(labels), LEARNERS, seed)
    elif setting.partition == "shards":
        parts = shards(labels, LEARNERS, 2, seed)
    else:
        parts = dirichlet(labels, LEARNERS, ALPHA, seed)
    data = folder / f"{setting.partition}.npz"
    arrays: dict[str, Any] = {f"part_{number}": part for number, part in enumerate(parts)}
    np.savez(data, images=images, labels=labels, test_images=test_images, test_labels=test_labels, **arrays)
    command = [python, "-m", "benchmarks.plain_fedavg", str(REPOSITORY), str(data), "--seed", str(seed)]
    command += ["--rounds", str(setting.limit), "--cohort", str(COHORT), "--target", str(setting.target)]
    command += ["--settings", json.dumps(_settings(setting))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    accuracies: list[float] = json.loads(done.stdout)
    return accuracies


def _environment(flops_: Flops) -> str:
    """The interpreter with the repository's packages, made by a project of one learner and one round."""
    outcome = flops_.train(
        {
            "repo": str(REPOSITORY),
            "name": "convergence-environment",
            "training": {"rounds": 1, "learners": 1},
            "data": {"mock": {"dataset": "mnist", "num_examples": 100}},
        },
        quiet=True,
    )
    if outcome.state != "finished":
        raise SystemExit(f"the repository did not train: {outcome.reason}")
    return flops_.environment_python(outcome.project)


if __name__ == "__main__":
    main()
