"""One manager with many projects and many readers: nothing lost, reads quick, events at once, memory small.

    python -m benchmarks.control_plane --json -

A real manager on an empty FLOPS_HOME: ``--projects`` projects are submitted at once, of which ``--running``
run at the same time (one learner, one round each, of a numpy model). Meanwhile and afterwards, 50 clients
with tokens of their own ask for the list, a project or its events, each ``--per-s`` times a second, and one
client follows the events of every project that runs. The limit beside the reads: the same clients asking for
``/v1/health``, which touches neither the database nor a token.

A browser (Debian's chromium) has the page of the first project open meanwhile, and afterwards, with nobody
else there, that of one more project of ten rounds; its pages are then opened with nothing cached.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import browser, report

FLOPS = str(Path(sys.executable).with_name("flops"))
CLIENTS = 50
_READS = ["/v1/projects?limit=50", "/v1/projects/{}", "/v1/projects/{}/events"]
_NOT_RUNNING = ("submitted", "finished", "failed", "stopped")
_PAGES = [
    "/",
    "/new",
    "/models",
    "/data",
    "/nodes",
    "/users",
    "/audit",
    "/projects/{}",
    "/projects/{}/events",
]
GOALS = {
    "lost_projects": 0,
    "read_p99_s": 0.05,
    "event_to_browser_s": 1.0,
    "first_paint_s": 1.0,
    "idle_rss_bytes": 150_000_000,
}
MODEL = """\
import numpy as np
from flops_utils.ml_repo_templates import ModelManagerTemplate


class ModelManager(ModelManagerTemplate):
    def __init__(self):
        self.parameters = [np.zeros((4, 3), np.float32)]

    def set_model_data(self):
        pass

    def get_model(self):
        return None

    def get_model_parameters(self):
        return self.parameters

    def set_model_parameters(self, parameters):
        self.parameters = parameters

    def fit_model(self):
        self.parameters = [parameter + 1 for parameter in self.parameters]
        return 2

    def evaluate_model(self):
        return 0.5, 0.5, 2
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.control_plane", description=__doc__.split("\n")[0])
    parser.add_argument("--projects", type=int, default=100)
    parser.add_argument("--running", type=int, default=20)
    parser.add_argument("--per-s", type=float, default=2.0, help="requests of each client")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window of reads")
    report.add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as name:
        report.write(measure(Path(name), options), options.json)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    (folder / "repository").mkdir()
    (folder / "repository" / "model_manager.py").write_text(MODEL)
    (folder / "repository" / "requirements.txt").write_text("numpy\n")
    with running_manager(folder / "home", options.running) as (client, manager):
        fresh = manager.memory_info().rss
        put_data(client, folder)
        tokens = [token_of(client, number) for number in range(CLIENTS)]
        return asyncio.run(use(client, tokens, folder, options, manager, fresh))


async def use(
    client: httpx.Client,
    tokens: list[str],
    folder: Path,
    options: argparse.Namespace,
    manager: psutil.Process,
    fresh: int,
) -> dict[str, Any]:
    spec = {
        "repo": str(folder / "repository"),
        "data": {"tags": ["bench"]},
        "training": {"rounds": 1, "learners": 1},
    }
    begun = time.perf_counter()
    submitted = [submit(client, spec) for _ in range(options.projects)]
    submitting = time.perf_counter() - begun
    url = str(client.base_url)
    async with crowd(url, tokens) as readers, browser.person(url, token_in(client)) as person:
        lags: list[float] = []
        most = [0]
        following = asyncio.create_task(follow_all(url, tokens[0], submitted, lags, most))
        watching = asyncio.create_task(person.watch(submitted[0])) if person is not None else None
        busy, busy_limit, late = await asyncio.gather(
            read(readers, submitted, options.seconds, options.per_s),
            read(readers, submitted, options.seconds, options.per_s / 4, paths=["/v1/health"]),
            own_lateness(options.seconds),
        )
        await following
        took = time.perf_counter() - begun
        states = await states_of(readers[0], submitted)
        await asyncio.sleep(5)
        idle_rss = manager.memory_info().rss
        idle = await read(readers, submitted, options.seconds, options.per_s)
        limit = await read(readers, submitted, options.seconds, options.per_s, paths=["/v1/health"])
        seen: dict[str, Any] = {}
        if person is not None and watching is not None:
            seen["while_projects_run"] = lateness(client, submitted[0], await watching)
            last = submit(client, {**spec, "training": {"rounds": 10, "learners": 1}})
            seen["one_project"] = lateness(client, last, await person.watch(last))
            paints = await person.first_paints([path.format(last) for path in _PAGES])
            seen["first_paints"] = {"pages": len(paints), "max_s": round(max(paints), 3)}
            seen["first_paint_s"] = round(statistics.median(paints), 3)
    lost = [project for project in submitted if states.get(project) != "finished"]
    return {
        "benchmark": "control_plane",
        "projects": options.projects,
        "running": options.running,
        "most_running": most[0],
        "lost_projects": len(lost),
        "reasons_of_lost": sorted({str(states.get(project)) for project in lost})[:5],
        "submitting_s": round(submitting, 3),
        "all_projects_s": round(took, 1),
        "clients": CLIENTS,
        "requests_per_s": CLIENTS * options.per_s,
        "read_p99_s": idle["p99_s"],
        "reads": {"idle": idle, "while_projects_run": {**busy, "limit": busy_limit, "clients_late": late}},
        "limit": {"what": "the same clients and /v1/health", **limit},
        "event_to_client_s": round(quantile(lags, 0.99), 4) if lags else None,
        "event_to_client_median_s": round(statistics.median(lags), 4) if lags else None,
        "events": len(lags),
        "event_to_browser_s": seen["one_project"]["max_s"] if seen else None,
        "first_paint_s": seen.pop("first_paint_s", None),
        "browser": seen,
        "fresh_rss_bytes": fresh,
        "idle_rss_bytes": idle_rss,
        "goals": GOALS,
    }


def token_in(client: httpx.Client) -> str:
    return str(client.headers["Authorization"].removeprefix("Bearer "))


def submit(client: httpx.Client, spec: dict[str, Any]) -> str:
    return str(client.post("/v1/projects", json={"spec": spec}).raise_for_status().json()["id"])


def lateness(client: httpx.Client, project: str, seen: dict[int, float]) -> dict[str, Any]:
    """How late events stood on a page: each by the clock of whoever made it, learners among them."""
    events = client.get(f"/v1/projects/{project}/events").raise_for_status().json()["events"]
    late = [seen[event["seq"]] - event["time"] for event in events if event["seq"] in seen]
    if not late:
        return {"events": 0}
    return {
        "events": len(late),
        "median_s": round(statistics.median(late), 4),
        "max_s": round(max(late), 4),
    }


@contextmanager
def running_manager(home: Path, running: int) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    environment = {**os.environ, "FLOPS_HOME": str(home), "FLOPS_MAX_RUNNING": str(running)}
    subprocess.run([FLOPS, "up"], env=environment, check=True, capture_output=True)
    try:
        address = json.loads((home / "manager.json").read_text())
        token = (home / "token").read_text().strip()
        time.sleep(3)  # its recorder starts
        with httpx.Client(
            base_url=address["url"],
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
        ) as client:
            yield client, psutil.Process(address["pid"])
    finally:
        subprocess.run([FLOPS, "down", "--force"], env=environment, check=False, capture_output=True)


def put_data(client: httpx.Client, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1.0, 2.0], "y": [0, 1]}), folder / "data.parquet")
    client.post(
        "/v1/data/fragments",
        params={"tag": "bench", "site": "north"},
        content=(folder / "data.parquet").read_bytes(),
        headers={"Content-Type": "application/vnd.apache.parquet"},
    ).raise_for_status()


def token_of(client: httpx.Client, number: int) -> str:
    name = f"reader-{number}"
    client.post("/v1/users", json={"name": name, "role": "auditor"}).raise_for_status()
    made = client.post("/v1/tokens", json={"user": name, "name": "benchmark"}).raise_for_status()
    return str(made.json()["token"])


@asynccontextmanager
async def crowd(url: str, tokens: list[str]) -> AsyncIterator[list[httpx.AsyncClient]]:
    clients = [
        httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
        )
        for token in tokens
    ]
    try:
        yield clients
    finally:
        for client in clients:
            await client.aclose()


async def read(
    clients: list[httpx.AsyncClient],
    projects: list[str],
    seconds: float,
    per_s: float,
    paths: list[str] | None = None,
) -> dict[str, float]:
    """Every client asks in its own rhythm; a slow answer makes none of them ask less."""
    took: list[float] = []

    async def ask(client: httpx.AsyncClient, path: str) -> None:
        begun = time.perf_counter()
        (await client.get(path)).raise_for_status()
        took.append(time.perf_counter() - begun)

    async def go(client: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(number)
        chosen = itertools.cycle(paths or _READS)
        asked = []
        await asyncio.sleep(dice.random() / per_s)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            path = next(chosen).format(dice.choice(projects))
            asked.append(asyncio.create_task(ask(client, path)))
            await asyncio.sleep(1 / per_s)
        await asyncio.gather(*asked)

    await asyncio.gather(*(go(client, number) for number, client in enumerate(clients)))
    return {"requests": len(took), **spread(took)}


async def follow_all(url: str, token: str, projects: list[str], lags: list[float], most: list[int]) -> None:
    """The events of all projects until they have ended; how late each of them came."""
    running: set[str] = set()
    bearer = {"Authorization": f"Bearer {token}"}
    # No limit: each stream is a connection of its own.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=bearer, timeout=None, trust_env=False, limits=limits
    ) as client:

        async def follow(project: str) -> None:
            path = f"/v1/projects/{project}/events"
            async with client.stream("GET", path, params={"follow": "true"}) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    event = json.loads(line[5:])
                    if event["kind"] == "project.state":
                        state = event["data"]["state"]
                        (running.discard if state in _NOT_RUNNING else running.add)(project)
                        most[0] = max(most[0], len(running))
                    # What was there before is no news.
                    if event["kind"] != "project.state" or event["data"]["state"] != "submitted":
                        lags.append(time.time() - event["time"])

        await asyncio.gather(*(follow(project) for project in projects))


async def states_of(client: httpx.AsyncClient, projects: list[str]) -> dict[str, str]:
    answers = [(await client.get(f"/v1/projects/{project}")).json() for project in projects]
    return {
        str(one.get("id")): "finished" if one.get("state") == "finished" else f"{one.get('reason')}"
        for one in answers
    }


async def own_lateness(seconds: float) -> dict[str, float]:
    """How late the clients themselves get a processor."""
    late = []
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        await asyncio.sleep(0.05)
        late.append(time.perf_counter() - begun - 0.05)
    return spread(late)


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "p50_s": round(quantile(seconds, 0.5), 5),
        "p99_s": round(quantile(seconds, 0.99), 5),
        "max_s": round(max(seconds), 5),
    }


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    main()
