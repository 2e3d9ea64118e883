"""What has to be the same after any faults: the outcome of a project, and what must not be left of it."""

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops.core.ids import ProjectId
from flops.tracking import Spool
from tests.chaos.home import Home
from tests.chaos.processes import left_over

_SHIPPED_S = 90.0
_LEFT_OVER = re.compile(r".*\.(part|new|tmp|broken)|\..*\.[0-9a-f]{8}|tmp.*")


@dataclass(frozen=True)
class Outcome:
    """How a project ended, without anything that depends on time or chance."""

    state: str
    reason: str | None
    model: str
    last_global: str
    rounds: tuple[int, ...]
    metrics: tuple[str, ...]
    best_round: int | None
    tracked_steps: tuple[int, ...]
    versions: int

    def differences(self, other: "Outcome") -> list[str]:
        """Where they differ, in words; this one is the undisturbed."""
        return [
            f"{name} is {_short(getattr(other, name))}, undisturbed {_short(getattr(self, name))}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]


def outcome(home: Home, project: str) -> Outcome:
    """Read how a project ended; waits until the recorder has shipped everything."""
    wait_until_shipped(home, project)
    state, reason = home.state(project)
    ((best,),) = home.query("select best_round from projects where id = ?", project)
    finished = home.events(project, "round.finished")
    folder = home.project_folder(project) / "state"
    last = max((event["round"] for event in finished), default=0)
    return Outcome(
        state=state,
        reason=reason,
        model=_digest(folder / "model.safetensors"),
        last_global=_digest(folder / f"global-{last}.safetensors"),
        rounds=tuple(event["round"] for event in finished),
        metrics=tuple(
            json.dumps(
                [event["metrics"], event["train_metrics"], event["cohort"], event["participants"]],
                sort_keys=True,
            )
            for event in finished
        ),
        best_round=best,
        tracked_steps=tuple(
            step for (step,) in _tracked(home, "select step from metrics where key = 'loss' order by step")
        ),
        versions=_tracked(home, "select count(*) from model_versions")[0][0],
    )


def wait_until_shipped(home: Home, project: str) -> None:
    """Wait until MLflow has all that the project's spool holds."""
    spool = Spool(home.settings.spool_dir)
    deadline = time.monotonic() + _SHIPPED_S
    home.client().close()
    while time.monotonic() < deadline:
        result = spool.result(ProjectId(project))
        ((cleaned,),) = home.query("select cleaned from projects where id = ?", project)
        if cleaned and result is not None and result.offset >= spool.size_bytes(ProjectId(project)):
            return
        time.sleep(0.1)


def problems(home: Home, project: str) -> list[str]:
    """What is wrong in itself, in words: rounds twice, records twice, files and values that do not fit."""
    found = []
    done: dict[str, list[int]] = {}
    for event in home.events(project, "round.started", "round.finished", "cluster.round"):
        number, where = event["round"], str(event.get("cluster") or "the root")
        committed = done.setdefault(where, [])
        if number in committed:
            found.append(f"round {number} of {where} is in {event['kind']} after it was committed")
        if event["kind"] != "round.started":
            committed.append(number)
    for where, committed in done.items():
        if committed != list(range(1, len(committed) + 1)):
            found.append(f"the rounds of {where} are {committed}")
    for key, step, count in _tracked(
        home,
        "select key, step, count(*) from metrics group by run_uuid, key, step having count(*) > 1",
    ):
        found.append(f"metric {key} of step {step} is tracked {count} times")
    runs = _tracked(home, "select count(*) from tags where key = 'flops.project' and value = ?", project)
    if runs != [(1,)]:
        found.append(f"it has {runs[0][0]} runs in MLflow")
    ended = _tracked(
        home,
        "select status from runs join tags on tags.run_uuid = runs.run_uuid"
        " where tags.key = 'flops.project' and tags.value = ?",
        project,
    )
    if ended != [("FINISHED",)]:
        found.append(f"its run in MLflow is {ended}")
    return found + _foreign_files(home, project)


def remains(home: Home) -> list[str]:
    """What is still there after everything was ended: processes and half-written files."""
    found = [f"process {process}" for process in left_over(home)]
    for path in home.settings.home.rglob("*"):
        inside = path.relative_to(home.settings.home)
        if inside.parts[0] not in ("environments", "mlartifacts", "models", "datasets"):
            if _LEFT_OVER.fullmatch(path.name):
                found.append(f"file {inside}")
        elif len(inside.parts) == 2 and _LEFT_OVER.fullmatch(path.name):
            found.append(f"file {inside}")
    if home.settings.run_dir.exists():
        found += [f"socket {path.name}" for path in home.settings.run_dir.glob("*.sock")]
    return found


def _foreign_files(home: Home, project: str) -> list[str]:
    """The aggregator's folder holds the last global model, the best one, the state and the reports alone."""
    folder = home.project_folder(project) / "state"
    if not (folder / "state.json").exists():
        return []
    state = json.loads((folder / "state.json").read_text())
    expected = {
        "state.json",
        "reports.jsonl",
        "reports.jsonl.accepted",
        "model.safetensors",
        f"global-{state['round']}.safetensors",
        f"best-{state['best_round']}.safetensors",
        f"strategy-{state['round']}.safetensors",
    }
    return [f"file state/{path.name}" for path in folder.iterdir() if path.name not in expected]


def _tracked(home: Home, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    return home.query(sql, *values, file=home.settings.home / "mlflow.db")


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return "missing"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 300 else f"{text[:140]} ... {text[-140:]}"
