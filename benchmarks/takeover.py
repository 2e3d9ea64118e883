"""From the end of the manager that acts to an answer of the one that stood by: killed, or frozen.

The limit beside it is what the lease costs by itself: a killed holder of the same machine is seen at the next
look (half a second), a frozen one when its lease has run out (six seconds after its last renewal) and at the
look behind that. The rest is a manager's start.

    python -m benchmarks.takeover --json -
"""

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from flops.cli import launch
from flops.client import Client
from flops.client.address import Address, local_address, local_token
from flops.persistence.lease import EXPIRES_S, POLL_S, RENEW_S
from tests.chaos.home import HomeOnPostgres
from tests.postgres import postgres_server

GOAL_S = 10.0
_DEADLINE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.takeover", description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="of each kind")
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name, postgres_server() as server:
        home = HomeOnPostgres(Path(name) / "home", server)
        try:
            result = measure(home, options.times)
        finally:
            launch.end_standbys(home.settings)
            home.end()
    report.write(result, options.json)


def measure(home: HomeOnPostgres, times: int) -> dict[str, Any]:
    active = home.stand_by()
    _wait_until_it_acts(home, active)
    found: dict[signal.Signals, list[float]] = {signal.SIGKILL: [], signal.SIGSTOP: []}
    for number in [*found] * times:
        standby = home.stand_by()
        time.sleep(random.uniform(0.0, RENEW_S))  # anywhere between two renewals
        begin = time.monotonic()
        os.kill(active.pid, number)
        _wait_until_it_acts(home, standby)
        found[number].append(time.monotonic() - begin)
        os.kill(active.pid, signal.SIGKILL)
        os.waitpid(active.pid, 0)
        active = standby
    return {
        "benchmark": "takeover",
        "times": times,
        "killed_s": _spread(found[signal.SIGKILL]),
        "killed_limit_s": POLL_S,
        "frozen_s": _spread(found[signal.SIGSTOP]),
        "frozen_limit_s": EXPIRES_S + POLL_S,
        "limit": "the lease's end, where it has to be waited for, and one look",
        "goal_s": GOAL_S,
    }


def _wait_until_it_acts(home: HomeOnPostgres, address: Address) -> None:
    """Until it is the manager that the address file names, and answers from the database."""
    deadline = time.monotonic() + _DEADLINE_S
    with Client(address.url, local_token(home.settings)) as client:
        while time.monotonic() < deadline:
            if local_address(home.settings) == address:
                client.list_projects()
                return
            time.sleep(0.02)
    raise SystemExit(f"no manager took over within {_DEADLINE_S:g} s")


def _spread(seconds: list[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 3),
        "max": round(ordered[-1], 3),
        "all": [round(value, 3) for value in seconds],
    }


if __name__ == "__main__":
    main()
