"""From the command to a registered model: a MNIST scikit-learn repository, 2 learners, 3 rounds.

Cold: an empty FLOPS_HOME and an empty uv cache, so packages and data are fetched and environments made.
Warm: the same command again. The limit beside it is what no platform can avoid: the user's own code, run
once in the finished environment without any federation.

    python -m benchmarks.project --json -

With ``--orchestrator docker`` every service is a container, of the engine at DOCKER_HOST or of one that is
started for it (as root), and the model is built into an image and served: base image, images, image registry
and all from nothing.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import report
from tests.engines import private_engine

REPOSITORY = Path(__file__).resolve().parents[1] / "examples" / "mnist-sklearn"
FLOPS = str(Path(sys.executable).with_name("flops"))
LEARNERS, ROUNDS = 2, 3
REFERENCE_S = 786.0
"""The reference implementation of FLOps, thesis evaluation, mean of ten runs."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.project", description=__doc__.split("\n")[0])
    parser.add_argument("--warm-runs", type=int, default=3)
    parser.add_argument("--orchestrator", choices=("process", "docker"), default="process")
    parser.add_argument("--deploy", action="store_true", help="build an image of the model and serve it")
    report.add_json_option(parser)
    options = parser.parse_args()
    containers = options.orchestrator == "docker"
    more = ["--deploy"] if options.deploy or containers else []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flops-bench-")))
        environment = {
            **os.environ,
            "FLOPS_HOME": str(folder / "home"),
            "UV_CACHE_DIR": str(folder / "uv-cache"),
            "FLOPS_ORCHESTRATOR": options.orchestrator,
        }
        if containers and "DOCKER_HOST" not in environment:
            environment["DOCKER_HOST"] = stack.enter_context(private_engine(bridge=True)).url
        try:
            cold = run(environment, more)
            warm = [run(environment, more) for _ in range(options.warm_runs)]
        finally:
            subprocess.run([FLOPS, "down", "--force"], env=environment, check=False, capture_output=True)
    warm.sort(key=lambda one: float(one["seconds"]))
    median = warm[len(warm) // 2]
    report.write(
        {
            "benchmark": "project",
            "orchestrator": options.orchestrator,
            "served": bool(more),
            "learners": LEARNERS,
            "rounds": ROUNDS,
            "cold_s": cold["seconds"],
            "warm_s": median["seconds"],
            "warm_s_all": [one["seconds"] for one in warm],
            "stages": {"cold": cold["stages"], "warm": median["stages"]},
            "accuracy": median["accuracy"],
            "limit_s": median["fit_s"],
            "limit": "training of the slowest learner in each round, added up (warm run)",
            "reference_s": REFERENCE_S,
            "reference_ratio": REFERENCE_S / cold["seconds"],
        },
        options.json,
    )


def run(environment: dict[str, str], more: Sequence[str]) -> dict[str, Any]:
    """One project through the command line; fails when it does not end with a registered model."""
    start = time.perf_counter()
    result = subprocess.run(
        [
            FLOPS,
            "run",
            str(REPOSITORY),
            "--mock",
            "mnist",
            "--learners",
            str(LEARNERS),
            "--rounds",
            str(ROUNDS),
            "--json",
            *more,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        raise SystemExit(f"flops run failed with exit code {result.returncode}:\n{result.stdout}")
    project = json.loads(result.stdout.strip().splitlines()[-1]) if result.stdout.count("\n{") else None
    project = project or json.loads(result.stdout)
    if not project["model"]:
        raise SystemExit(f"project {project['id']} registered no model")
    if more and not project["deployment"]:
        raise SystemExit(f"the model of project {project['id']} is not served")
    listed = subprocess.run(
        [FLOPS, "events", project["id"], "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    events = [json.loads(line) for line in listed.splitlines() if line.startswith("{")]
    rounds = [event["data"] for event in events if event["kind"] == "round.finished"]
    return {
        "seconds": round(seconds, 3),
        "stages": stages(events),
        "accuracy": project["metrics"]["accuracy"],
        "fit_s": round(sum(max(data["fit_s"].values()) for data in rounds), 3),
    }


def stages(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds in each step and state; the export's environment is made while training runs."""
    result: dict[str, float] = {}
    for event in events:
        if event["kind"] == "step.finished":
            result[event["data"]["step"]] = round(event["data"]["duration_s"], 3)
    states = [event for event in events if event["kind"] == "project.state"]
    for state, following in itertools.pairwise(states):
        name = f"state {state['data']['state']}"
        result[name] = round(following["time"] - state["time"], 3)
    return result


if __name__ == "__main__":
    main()
