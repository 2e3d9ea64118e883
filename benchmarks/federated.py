"""Projects run for benchmarks, through the command line as a user does, in a FLOPS_HOME of their own."""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from flops.core.errors import UnavailableError
from flops.core.settings import Settings
from flops.data import DataClient, known_dataset, read_token, unix_location

FLOPS = str(Path(sys.executable).with_name("flops"))
Images = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Outcome:
    """One training: what the aggregator measured after each round, over all learners that evaluated."""

    project: str
    state: str
    reason: str | None = None
    accuracies: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    """Seconds of each round, as the aggregator took them."""
    fit_s: list[float] = field(default_factory=list)
    """Seconds that all learners of a round spent in the user's own training, added up."""
    ejected: list[str] = field(default_factory=list)

    def rounds_to(self, target: float) -> float | None:
        """Rounds until the best accuracy so far reaches the target, with linear interpolation between rounds.

        Source:
            McMahan et al. 2017, arXiv:1602.05629, section 3: how the paper reads its learning curves.
        """
        return rounds_to(self.accuracies, target)


def rounds_to(accuracies: list[float], target: float) -> float | None:
    """See `Outcome.rounds_to`; None: never reached."""
    before = 0.0
    for number, accuracy in enumerate(accuracies, start=1):
        if accuracy >= target:
            return round(number - 1 + (target - before) / (accuracy - before), 1)
        before = max(before, accuracy)
    return None


class Flops:
    """The command line with one FLOPS_HOME."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        self._environment = {**os.environ, "FLOPS_HOME": str(home)}

    def train(self, spec: Mapping[str, Any], target: float | None = None, quiet: bool = False) -> Outcome:
        """Run a project to its end, or until the accuracy reaches the target (it is stopped then)."""
        submitted = json.loads(self._call("run", "--spec", "-", "--detach", "--json", given=json.dumps(spec)))
        outcome = Outcome(submitted["id"], "running")
        stopped = False
        for event in self._events(outcome.project):
            data = event["data"]
            if event["kind"] == "project.state":
                outcome.state, outcome.reason = data["state"], data.get("reason")
            elif event["kind"] == "learner.ejected":
                outcome.ejected.append(data["learner"])
            elif event["kind"] == "round.finished" and not stopped:
                outcome.accuracies.append(float(data["metrics"]["accuracy"]))
                outcome.round_s.append(round(float(data["duration_s"]), 3))
                outcome.fit_s.append(round(sum(data.get("fit_s", {}).values()), 3))
                if not quiet:
                    say(f"{spec.get('name')}: round {len(outcome.accuracies)}: {outcome.accuracies[-1]:.4f}")
                if target is not None and outcome.accuracies[-1] >= target:
                    stopped = True
                    self._call("stop", outcome.project)
        return outcome

    def environment_python(self, project: str) -> str:
        """The interpreter that a project's user code ran with."""
        for path in sorted((self.settings.home / "projects" / project / "config").glob("*.json")):
            python = json.loads(path.read_text()).get("python")
            if python:
                return str(python)
        raise SystemExit(f"no configuration of project {project} names an interpreter")

    @contextmanager
    def data(self) -> Iterator[DataClient]:
        """The data server of this manager, which is started if need be."""
        self._call("up")
        token = read_token(self.settings.home / "data.token")
        with DataClient(unix_location(self.settings.data_socket), token) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    break
                except UnavailableError:  # it starts after the manager
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
            yield client

    def close(self) -> None:
        subprocess.run(
            [FLOPS, "down", "--force"], env=self._environment, check=False, capture_output=True, timeout=120
        )

    def _events(self, project: str) -> Iterator[dict[str, Any]]:
        command = [FLOPS, "events", project, "--follow", "--json"]
        with subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)

    def _call(self, *arguments: str, given: str | None = None) -> str:
        done = subprocess.run(
            [FLOPS, *arguments],
            env=self._environment,
            input=given,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"flops {' '.join(arguments)} failed with exit code {done.returncode}")
        return done.stdout


@contextmanager
def flops(home: Path | None) -> Iterator[Flops]:
    """The command line in ``home``; None: in a temporary folder. Its manager is stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="flops-bench-") as temporary:
        started = Flops(home or Path(temporary))
        started.settings.home.mkdir(exist_ok=True, mode=0o700)
        try:
            yield started
        finally:
            started.close()


def load_mnist(folder: Path, split: str) -> tuple[Images, Labels]:
    """Images (n, 28, 28) and labels (n,) of real MNIST."""
    path = known_dataset("mnist", folder, split="test" if split == "test" else "train")
    table = pq.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(value["bytes"]))) for value in table["image"].to_pylist()]
    return np.stack(images), table["label"].to_numpy()


def say(text: str) -> None:
    """A line of progress, beside the JSON."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
