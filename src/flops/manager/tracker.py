"""What the tracker is told of a project: events of the store become records of the spool.

The spool comes first and the note of what was spooled second, so a crash in between tells something twice;
the recorder promises that twice is once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flops.core.events import Event, EventKind
from flops.core.ids import ProjectId
from flops.core.spec import ProjectSpec
from flops.manager.rows import Project
from flops.manager.states import State
from flops.manager.store import Store
from flops.tracking import (
    ArtifactExported,
    ModelExported,
    Record,
    Result,
    RoundMetrics,
    RunEnded,
    Spool,
    audience,
    run_started,
)

_STATUS = {
    State.FINISHED: "FINISHED",
    State.FAILED: "FAILED",
    State.STOPPED: "KILLED",
}
_FIGURES = ("duration_s", "bytes_down", "bytes_up")
"""Of a round as a whole; kept as ``round_NAME``."""
_LONGEST_VALUE = 5000  # of MLflow's tags and parameters


class Tracker:
    """Writes records; safe to call again after a crash, from one thread for each project."""

    def __init__(self, spool: Spool, store: Store) -> None:
        self._spool = spool
        self._store = store

    def begin(self, project: Project, spec: ProjectSpec, results: Mapping[str, Mapping[str, Any]]) -> None:
        """The project's run, with what an auditor asks for first."""
        self._spool.append(
            project.id,
            run_started(
                time=project.created,
                experiment=spec.tracking.experiment or project.name,
                name=f"{project.name} {project.id}",
                spec=spec.to_json(redacted=True),
                repository=spec.redacted_repo,
                commit=results["fetch"]["commit"],
                lock=results["lock"]["hash"],
                mode=spec.training.mode,
                strategy=spec.training.strategy.name,
                tags={"flops.project": project.id, "flops.initial": spec.model.initial or ""},
                audience=audience(project.owner, project.team),
            ),
        )

    def ship(self, project: ProjectId) -> None:
        """Everything that happened since the last time."""
        while True:
            row = self._store.project(project)
            events = self._store.events(project, after=row.spooled_seq)
            if not events:
                return
            kinds = {EventKind.ROUND_FINISHED}
            if (row.spec.get("tracking") or {}).get("clusters"):
                kinds.add(EventKind.CLUSTER_ROUND)
            records = [_round_metrics(event) for event in events if event.kind in kinds]
            if records:
                self._spool.append(project, *records)
            self._store.set_spooled(project, events[-1].seq)

    def model(
        self,
        project: Project,
        *,
        name: str,
        directory: str,
        parameters: str,
        rounds: int,
        tags: Mapping[str, str],
    ) -> None:
        """The model that is the result so far, after so many rounds."""
        training = project.training or {}
        self._spool.append(
            project.id,
            ModelExported(
                time=project.created,
                round=_best_round(project),
                name=name,
                directory=directory,
                metrics=_numbers(training.get("metrics") or project.metrics or {}),
                tags=dict(tags),
                parameters=parameters,
                rounds=rounds,
                audience=audience(project.owner, project.team),
            ),
        )

    def parameters(self, project: Project, file: Path, *, rounds: int) -> None:
        """The bare parameters of a model that could not be exported."""
        self._spool.append(
            project.id,
            ArtifactExported(time=project.created, round=_best_round(project), file=str(file), rounds=rounds),
        )

    def end(self, project: Project) -> None:
        """The run's end, once the project has come to its own."""
        status = _STATUS[project.state]
        record: Record = RunEnded(
            time=project.finished or project.updated,
            status=status,  # type: ignore[arg-type]
            reason=(project.reason or "")[:_LONGEST_VALUE],
        )
        self._spool.append(project.id, record)

    def result(self, project: ProjectId) -> Result | None:
        """What the recorder made of it so far."""
        return self._spool.result(project)

    def remove(self, project: ProjectId) -> None:
        self._spool.remove(project)


def _best_round(project: Project) -> int:
    return project.best_round if project.best_round is not None else project.rounds_done


def _round_metrics(event: Event) -> RoundMetrics:
    data = event.data
    metrics = _numbers(data.get("metrics") or {})
    metrics |= {f"train_{key}": value for key, value in _numbers(data.get("train_metrics") or {}).items()}
    metrics |= {
        f"round_{key}": value for key, value in _numbers({key: data.get(key) for key in _FIGURES}).items()
    }
    for learner, own in (data.get("learners") or {}).items():
        metrics |= {f"{learner}/{key}": value for key, value in _numbers(own).items()}
    metrics |= _numbers(
        {"participants": data.get("participants"), "left_out": len(data.get("left_out") or ())}
    )
    # Of an asynchronous training: how far the global model was ahead of what the updates were made from.
    metrics |= _numbers({"version": data.get("version")})
    metrics |= {f"staleness_{key}": value for key, value in _numbers(data.get("staleness") or {}).items()}
    return RoundMetrics(
        time=event.time, step=int(data["round"]), metrics=metrics, cluster=data.get("cluster")
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
