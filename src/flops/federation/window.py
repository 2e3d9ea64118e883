"""The window between two commits of an asynchronous training: what its report tells."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flops.federation.mean import weighted_metrics
from flops.federation.updates import Update


@dataclass
class Window:
    """What has happened since the last commit."""

    since: float
    announced: bool = False
    """Whether anybody was told that this round has begun."""
    due_since: float | None = None
    """Since when its commit waits for evaluations of the one before."""
    updates: list[dict[str, Any]] = field(default_factory=list)
    """Of each accepted update: learner, the version it was made from, its staleness and discount."""
    learner_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    _train_metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _fit_s: dict[str, float] = field(default_factory=dict)

    def take(self, update: Update, staleness: int, discount: float) -> None:
        """Note an accepted update."""
        self.updates.append(
            {
                "learner": update.learner,
                "version": update.version,
                "staleness": staleness,
                "discount": round(discount, 6),
            }
        )
        metrics = dict(update.metrics)
        self._train_metrics.append((float(update.num_examples), metrics))
        self.learner_metrics.setdefault(update.learner, {}).update(metrics)
        self._fit_s[update.learner] = round(update.fit_s, 4)
        self.bytes_up += update.nbytes

    def report(self, now: float) -> dict[str, Any]:
        """What is told of this window when it ends."""
        staleness = [update["staleness"] for update in self.updates]
        return {
            "participants": len(self._fit_s),
            "left_out": self.left_out,
            "fit_s": self._fit_s,
            "train_metrics": weighted_metrics(self._train_metrics),
            "staleness": {"mean": float(np.mean(staleness)), "max": max(staleness)} if staleness else {},
            "updates": self.updates,
            "duration_s": now - self.since,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
        }
