"""From kill -9 of the aggregator to the next round under way: a real project, killed again and again.

The limit beside it is what no restart can avoid: starting an interpreter with the libraries that the
aggregator is made of, measured between the kills of the same run. (Much of the rest is the round itself: what
is measured ends with the first round that was begun or finished after the kill.)

    python -m benchmarks.recovery --json -
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from tests.chaos.home import Home
from tests.chaos.processes import kill, processes
from tests.chaos.repository import make_repository, project_spec

LEARNERS = 3
LIBRARIES = "import numpy, pyarrow.flight, flwr.app, flwr.serverapp.strategy"
TRAINING_S = 180.0
CAME_BACK_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.recovery", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=15)
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name:
        home = Home(Path(name) / "home")
        try:
            result = measure(home, Path(name), options.kills)
        finally:
            home.end()
    report.write(result, options.json)


def measure(home: Home, folder: Path, kills: int) -> dict[str, Any]:
    home.put_data(LEARNERS)
    spec = project_spec(make_repository(folder / "repository"), learners=LEARNERS, rounds=100_000, seed=0)
    project = home.submit(spec)
    times, limits, restarts = [], [], []
    for _ in range(kills):
        wait_for_rounds(home, project, time.time(), TRAINING_S)
        time.sleep(random.uniform(0.5, 1.5))  # anywhere in a round
        (aggregator,) = [one for one in processes(home) if one.kind == "aggregator"]
        killed_at = time.time()
        assert kill(aggregator)
        times.append(wait_for_rounds(home, project, killed_at, CAME_BACK_S) - killed_at)
        restarts.append(_started_at(home, killed_at) - killed_at)
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", LIBRARIES], check=True)
        limits.append(time.perf_counter() - begin)
    return {
        "benchmark": "recovery",
        "learners": LEARNERS,
        "kills": kills,
        "recovery_s": _spread(times),
        "process_started_again_s": _spread(restarts),
        "limit_s": statistics.median(limits),
        "limit": "start of an interpreter with the aggregator's libraries, median",
        "goal_s": 3.0,
        "recovery_s_all": [round(seconds, 3) for seconds in times],
    }


def wait_for_rounds(home: Home, project: str, after: float, timeout_s: float) -> float:
    """When the first round after some time was begun or finished."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = home.query(
            "select min(time) from events where project = ? and time > ?"
            " and kind in ('round.started', 'round.finished')",
            project,
            after,
        )
        if found[0][0] is not None:
            return float(found[0][0])
        if home.over(project):
            raise SystemExit(f"project {project} is {home.state(project)}")
        time.sleep(0.05)
    raise SystemExit(f"project {project} made no round within {timeout_s:g} s")


def _started_at(home: Home, after: float) -> float:
    """When the manager asked for the restart."""
    found = home.query("select min(time) from events where kind = 'warning' and time > ?", after)
    return float(found[0][0])


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 3),
        "p90": round(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


if __name__ == "__main__":
    main()
