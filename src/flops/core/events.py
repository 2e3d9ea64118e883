"""Events: what happened in a project, in order; the one record that users, recorder and GUI read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    """Every kind of event there is; data keys in brackets."""

    PROJECT_STATE = "project.state"  # [state, reason]
    STEP_STARTED = "step.started"  # [step]
    STEP_PROGRESS = "step.progress"  # [step, message]
    STEP_FINISHED = "step.finished"  # [step, duration_s, ...]
    WARNING = "warning"  # [message]
    LEARNER_CONNECTED = "learner.connected"  # [learner]
    LEARNER_LEFT = "learner.left"  # [learner, reason]
    LEARNER_EJECTED = "learner.ejected"  # [learner, reason]: it may not come back
    CLUSTERS_FORMED = "clusters.formed"  # [clusters: learners by cluster, round_trip_ms by learner]
    CLUSTER_CONNECTED = "cluster.connected"  # [cluster]
    CLUSTER_LEFT = "cluster.left"  # [cluster, reason, final]
    CLUSTER_ROUND = "cluster.round"
    # [cluster, cycle, round, rounds, participants, train_metrics, metrics, left_out, duration_s, bytes_*]
    TRAINING_WAITING = "training.waiting"  # [connected, needed, deadline_s]
    ROUND_STARTED = "round.started"  # [round, cohort]
    UPDATE_RECEIVED = "update.received"  # [round, learner, bytes, fit_s]
    UPDATE_REFUSED = "update.refused"  # [round, learner, reason, late: it came after its round]
    ROUND_FINISHED = "round.finished"
    # [round, participants, left_out, train_metrics, metrics, duration_s, bytes_down, bytes_up]; a round of
    # a hierarchy's root is a cycle: [cycle, cycles] stand beside it; asynchronous: [version, staleness]
    TRAINING_FINISHED = "training.finished"  # [rounds, best_round, model_file, metrics]
    TRAINING_FAILED = "training.failed"  # [round, reason]
    MODEL_REGISTERED = "model.registered"  # [name, version, round, uri]
    MODEL_DEPLOYED = "model.deployed"  # [name, version, url, kind, image]
    MODEL_UNDEPLOYED = "model.undeployed"  # [name, version]


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``seq`` grows by one within a project and never changes."""

    project: str
    seq: int
    time: float
    kind: EventKind
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "project": self.project,
            "seq": self.seq,
            "time": self.time,
            "kind": str(self.kind),
            "data": dict(self.data),
        }
