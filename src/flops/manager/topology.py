"""Which aggregators a project has, who takes part in each, and what each is to do. Pure functions.

A classic training has one aggregator; a hierarchy has a root, whose rounds are the cycles, one aggregator for
each cluster, whose rounds are those inside a cycle, and one for each cluster of clusters, which passes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flops.core.spec import ProjectSpec
from flops.federation import Plan
from flops.manager.rows import Learner

_SERVER_OPTIMISERS = frozenset({"FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"})
"""Step from a mean: at the root, where all means meet."""
_MEANS = frozenset({"FedAvg", "FedProx"})
"""The same at every level; all others compare single learners, so they work where these are."""


@dataclass(frozen=True)
class Seat:
    """Somebody's place at an aggregator; ``slot`` of a cluster is the smallest of its learners, or its number
    where they are not known yet.
    """

    kind: Literal["learner", "cluster"]
    slot: int
    max_examples: int | None


@dataclass(frozen=True)
class Aggregator:
    """One aggregator; ``cluster`` and ``number`` are None at the root."""

    cluster: str | None
    number: int | None
    seats: Mapping[str, Seat]
    plan: Plan

    @property
    def parent(self) -> str | None:
        """The cluster above it; None: the root is."""
        return parent_of(self.cluster or "")


def parent_of(cluster: str) -> str | None:
    return cluster.rpartition("/")[0] or None


def places_itself(spec: ProjectSpec) -> bool:
    """Whether the root measures its learners and says who trains with whom, instead of the manager."""
    clusters = spec.training.clusters
    return clusters is not None and clusters.by == "latency"


def home_of(spec: ProjectSpec, learner: Learner) -> str | None:
    """The cluster whose aggregator a learner connects to at first; None: the root's."""
    return None if places_itself(spec) else learner.cluster


def aggregators(
    spec: ProjectSpec,
    learners: Sequence[Learner],
    examples: Mapping[str, int | None],
    rounds: int,
    numbers: Mapping[str, int],
) -> list[Aggregator]:
    """Every aggregator of a project, the root first.

    Args:
        examples: of each site; None where that is not known.
        rounds: of the root.
        numbers: of the clusters, by path.
    """
    seats: dict[str | None, dict[str, Seat]] = {None: {}, **{path: {} for path in numbers}}
    if places_itself(spec):  # any learner may be put into any cluster
        everybody = {str(one.learner): Seat("learner", one.number, examples[one.site]) for one in learners}
        total = _sum([seat.max_examples for seat in everybody.values()])
        for path, number in numbers.items():
            seats[path] = everybody
            seats[None][path] = Seat("cluster", number, total)
        return _with_plans(spec, seats, numbers, rounds)
    for learner in learners:
        seats[learner.cluster][learner.learner] = Seat("learner", learner.number, examples[learner.site])
    for path in sorted(numbers, key=lambda path: -path.count("/")):  # inner before outer
        members = seats[path].values()
        slot = min(seat.slot for seat in members)
        seats[parent_of(path)][path] = Seat("cluster", slot, _sum([seat.max_examples for seat in members]))
    return _with_plans(spec, seats, numbers, rounds)


def _sum(bounds: Sequence[int | None]) -> int | None:
    known = [bound for bound in bounds if bound is not None]
    return sum(known) if len(known) == len(bounds) else None


def _with_plans(
    spec: ProjectSpec,
    seats: Mapping[str | None, Mapping[str, Seat]],
    numbers: Mapping[str, int],
    rounds: int,
) -> list[Aggregator]:
    plans = _plans(spec, seats, rounds)
    return [Aggregator(path, numbers.get(path or ""), seats[path], plans[path]) for path in (None, *numbers)]


def _plans(
    spec: ProjectSpec, seats: Mapping[str | None, Mapping[str, Seat]], rounds: int
) -> dict[str | None, Plan]:
    training = spec.training
    own: dict[str, Any] = {
        "strategy": training.strategy.name,
        "strategy_parameters": training.strategy.parameters,
    }
    everybody: dict[str, Any] = {
        "start_deadline_s": training.start_deadline_s,
        "seed": training.seed,
        "selection_metric": spec.selection.metric,
        "selection_best": spec.selection.best or "min",
        "learner_metrics": spec.tracking.learner_metrics,
        "eject_after": training.eject_after,
    }
    over_learners = everybody | {
        "fraction_fit": training.fraction_fit,
        "fraction_evaluate": training.fraction_evaluate,
        "min_available_learners": training.min_available_learners,
        "min_fit_learners": training.min_fit_learners,
        "min_evaluate_learners": training.min_evaluate_learners,
        "quorum": training.quorum,
        "cohort": training.cohort,
        "over_sample": training.over_sample,
        "max_update_norm": training.max_update_norm,
        "round_deadline_s": training.round_deadline_s,
    }
    if training.mode != "hierarchical":
        return {None: Plan(rounds=rounds, **own, **over_learners)}
    name = training.strategy.name
    of_root = own if name in _SERVER_OPTIMISERS | _MEANS else {}
    of_cluster = {} if name in _SERVER_OPTIMISERS else own
    of_middle = own if name in _MEANS else {}
    deadlines = _deadlines(spec, seats)
    plans: dict[str | None, Plan] = {}
    for path, members in seats.items():
        over_clusters = any(seat.kind == "cluster" for seat in members.values())
        if not over_clusters:
            plans[path] = Plan(
                rounds=training.rounds,
                cycles=rounds,
                evaluate_every_round=spec.tracking.clusters,
                **of_cluster,
                **over_learners,
            )
            continue
        wanted = min(training.min_clusters, len(members))
        plans[path] = Plan(
            rounds=rounds if path is None else 1,
            cycles=rounds,
            first_deadline_s=2.0 * Plan.first_deadline_s * training.rounds,
            fraction_evaluate=1.0 if training.fraction_evaluate > 0 else 0.0,
            min_available_learners=wanted,
            min_fit_learners=wanted,
            min_evaluate_learners=wanted,
            round_deadline_s=deadlines[path],
            **(of_root if path is None else of_middle),
            **everybody,
        )
    return plans


def _deadlines(
    spec: ProjectSpec, seats: Mapping[str | None, Mapping[str, Seat]]
) -> dict[str | None, float | None]:
    """How long an aggregator may wait for its members: a cluster that waits for late learners in each of its
    rounds, for as long as it may, is not late itself.
    """
    alone = spec.training.round_deadline_s
    if alone is None:
        return dict.fromkeys(seats)
    deadlines: dict[str | None, float | None] = {}
    by_depth = sorted(seats, key=lambda path: -1 if path is None else path.count("/"), reverse=True)
    for path in by_depth:
        longest = alone
        for name, seat in seats[path].items():
            if seat.kind == "cluster":
                over_clusters = any(inner.kind == "cluster" for inner in seats[name].values())
                rounds = 1 if over_clusters else spec.training.rounds
                longest = max(longest, 2.0 * rounds * (deadlines[name] or alone))
        deadlines[path] = longest
    return deadlines
