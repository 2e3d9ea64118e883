"""The evaluation of one committed model of an asynchronous training: it goes on beside the next updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flops.federation.hub import GlobalModel
from flops.federation.mean import weighted_metrics
from flops.federation.roster import first_of


@dataclass
class Evaluation:
    """What learners say of one committed model, so far."""

    task: str
    model: GlobalModel
    least: int
    """Answers without which the model has no metrics."""
    until: float
    """How long the last commit of a training waits for more answers than the least (monotonic seconds)."""
    chosen: set[str] = field(default_factory=set)
    results: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def outstanding(self) -> set[str]:
        """Who was chosen, and has not answered."""
        return self.chosen - self.results.keys() - self.left_out.keys()

    @property
    def missing(self) -> int:
        """Answers that lack."""
        return max(0, self.least - len(self.results))

    def metrics(self, slots: Mapping[str, int]) -> dict[str, float]:
        """Of the model, weighted by the evaluated examples; empty with fewer answers than the least."""
        if self.missing:
            return {}
        # In slot order, so that sums do not depend on the order of arrival.
        results = [self.results[learner] for learner in sorted(self.results, key=slots.__getitem__)]
        return weighted_metrics([(float(num_examples), metrics) for num_examples, metrics in results])

    def too_few(self, round_number: int, project: str) -> str:
        """Why the training cannot finish with this evaluation."""
        text = (
            f"round {round_number} of project {project} needs {self.least} "
            f"evaluation{'s' if self.least > 1 else ''}, {len(self.results)} of {len(self.chosen)} "
            "learners returned a usable one"
        )
        return text + first_of(self.left_out)
