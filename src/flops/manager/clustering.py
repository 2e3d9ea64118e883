"""Who trains with whom: from the chosen sites to the clusters of a hierarchy. Pure functions.

Promises: every learner is in exactly one cluster, clusters that are formed by number differ in size by one at
most, and the same question has the same answer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flops.core.errors import InvalidInputError
from flops.core.spec import ClustersSpec, TrainingSpec

Clusters = dict[str, list[str]]
"""Learners by the path of their cluster, in the order of their numbers; nobody in any cluster where they are
placed later."""

_ROOT = "aggregator"
_DEEPEST = 8


@dataclass(frozen=True)
class Candidate:
    """A learner as far as it matters here."""

    learner: str
    site: str
    labels: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """What the fragments of its site say, by name."""
    histogram: Mapping[str, int] | None = None
    """Examples by class, with noise; None: its owner does not tell."""


def form(spec: ClustersSpec, candidates: Sequence[Candidate]) -> Clusters:
    """Divide learners into clusters.

    Args:
        candidates: in the order of their numbers.
    Raises:
        InvalidInputError: the sites that were chosen do not fit what was asked for.
    """
    match spec.by:
        case "groups":
            return by_groups(spec.groups or {}, candidates)
        case "label":
            return by_label(spec.label or "", candidates)
        case "distribution":
            return by_distribution(candidates, how_many(spec, len(candidates)))
        case "size":
            return by_size(candidates, how_many(spec, len(candidates)))
        case "latency":  # the root measures and decides
            return {path: [] for path in by_size(candidates, how_many(spec, len(candidates)))}


def how_many(spec: ClustersSpec, learners: int) -> int:
    """Clusters to form of so many learners.

    Raises:
        InvalidInputError: more clusters than learners are asked for.
    """
    if spec.count is not None and spec.count > learners:
        raise InvalidInputError(
            f"training.clusters.count is {spec.count}, but there {'are' if learners != 1 else 'is'} only "
            f"{learners} learner{'s' if learners != 1 else ''} - lower it, or choose more data"
        )
    if spec.count is not None:
        return spec.count
    if spec.size is not None:
        return math.ceil(learners / spec.size)
    return max(1, round(math.sqrt(learners)))


def by_size(candidates: Sequence[Candidate], count: int) -> Clusters:
    """``count`` clusters of neighbours."""
    least, more = divmod(len(candidates), count)
    clusters: Clusters = {}
    start = 0
    for number in range(1, count + 1):
        end = start + least + (number <= more)
        clusters[f"cluster-{number}"] = [one.learner for one in candidates[start:end]]
        start = end
    return clusters


def by_groups(groups: Mapping[str, Sequence[str]], candidates: Sequence[Candidate]) -> Clusters:
    """As the spec names them: sites, or learners."""
    known = {one.site: one.learner for one in candidates} | {one.learner: one.learner for one in candidates}
    group_of: dict[str, str] = {}
    for path, names in groups.items():
        _check_path(path)
        for name in names:
            learner = known.get(name)
            if learner is None:
                raise InvalidInputError(
                    f"training.clusters.groups puts '{name}' into cluster {path}, but no chosen site is "
                    f"called so - chosen are {_some([one.site for one in candidates])}"
                )
            if group_of.setdefault(learner, path) != path:
                raise InvalidInputError(
                    f"training.clusters.groups puts '{name}' into clusters {group_of[learner]} and {path} - "
                    "leave it in one of them"
                )
    alone = [one.site for one in candidates if one.learner not in group_of]
    if alone:
        raise InvalidInputError(
            f"training.clusters.groups has no cluster for {_some(alone)} - add "
            f"{'them' if len(alone) > 1 else 'it'} to one, or choose other data"
        )
    return _grouped({one.learner: group_of[one.learner] for one in candidates})


def by_label(label: str, candidates: Sequence[Candidate]) -> Clusters:
    """One cluster for each value of a label; ``europe/north`` lies inside ``europe``."""
    path_of: dict[str, str] = {}
    value_of: dict[str, str] = {}
    for one in candidates:
        values = one.labels.get(label, frozenset())
        if len(values) != 1:
            several = " and ".join(f"'{value}'" for value in sorted(values))
            raise InvalidInputError(
                f"site '{one.site}' has {f'the labels {several}' if values else 'no label'} for '{label}', "
                f"by which training.clusters divides - put its data with '--label {label}=VALUE'"
            )
        (value,) = values
        path = path_of[one.learner] = _as_path(value)
        if value_of.setdefault(path, value) != value:
            raise InvalidInputError(
                f"the values '{value_of[path]}' and '{value}' of label '{label}' would both be cluster "
                f"{path} - choose values that differ in more than signs"
            )
    return _grouped(path_of)


def by_distribution(candidates: Sequence[Candidate], count: int) -> Clusters:
    """Clusters whose mixtures of classes are alike.

    Greedy: the learners with most examples first, each to the cluster that comes nearest to its share of
    every class with it (L2 norm); who does not tell fills up at the end.
    """
    told = [one for one in candidates if one.histogram is not None]
    counts = {one.learner: {key: max(0, n) for key, n in (one.histogram or {}).items()} for one in told}
    classes = sorted({key for histogram in counts.values() for key in histogram})
    share = {key: sum(h.get(key, 0) for h in counts.values()) / count for key in classes}
    held = [dict.fromkeys(classes, 0.0) for _ in range(count)]
    members: list[list[str]] = [[] for _ in range(count)]
    least, more = divmod(len(candidates), count)

    def is_open(number: int) -> bool:
        full = sum(len(some) > least for some in members)
        return len(members[number]) < least or (len(members[number]) == least and full < more)

    def worse(number: int, histogram: Mapping[str, int]) -> float:
        """How much farther from its share the cluster is with the learner than without."""
        return sum(n * (n + 2 * (held[number][key] - share[key])) for key, n in histogram.items())

    for one in sorted(told, key=lambda one: -sum(counts[one.learner].values())):
        own = counts[one.learner]
        number = min(filter(is_open, range(count)), key=lambda number: worse(number, own))
        members[number].append(one.learner)
        for key, n in own.items():
            held[number][key] += n
    for one in candidates:
        if one.histogram is None:
            number = min(filter(is_open, range(count)), key=lambda number: len(members[number]))
            members[number].append(one.learner)
    cluster_of = {learner: number for number, some in enumerate(members, start=1) for learner in some}
    return _grouped({one.learner: f"cluster-{cluster_of[one.learner]}" for one in candidates})


def check_minimums(clusters: Clusters, training: TrainingSpec, learners: int) -> None:
    """Args: learners is how many there are in all.

    Raises:
        InvalidInputError: a cluster can never have as many learners as a round of it needs, or the root can
            never have as many clusters.
    """
    evaluate = training.min_evaluate_learners if training.fraction_evaluate > 0 else 0
    needed = max(
        training.min_available_learners, training.min_fit_learners, evaluate, training.updates_needed
    )
    for path, size in _sizes(clusters, learners).items():
        if size < needed:
            raise InvalidInputError(
                f"cluster {path} has {size} learner{'s' if size > 1 else ''}, but a round "
                f"inside a cluster needs {needed} - lower training.min_available_learners and its like, or "
                "form fewer clusters"
            )
    top = {path.partition("/")[0] for path in clusters}
    if len(top) < training.min_clusters:
        raise InvalidInputError(
            f"training.min_clusters is {training.min_clusters}, but there {'are' if len(top) > 1 else 'is'} "
            f"{len(top)} ({_some(sorted(top))}) - lower it, or form more clusters"
        )


def _sizes(clusters: Clusters, learners: int) -> dict[str, int]:
    """Learners of each cluster: those who are in it, or an equal share where nobody is placed yet."""
    placed = any(clusters.values())
    share = learners // len(clusters)
    return {path: len(members) if placed else share for path, members in clusters.items()}


def with_ancestors(paths: Sequence[str]) -> list[str]:
    """Every cluster that these lie in, and themselves, in order: outer before inner."""
    found = set()
    for path in paths:
        parts = path.split("/")
        found |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return sorted(found)


def _grouped(cluster_of: Mapping[str, str]) -> Clusters:
    clusters: Clusters = {path: [] for path in sorted(set(cluster_of.values()))}
    for learner, path in cluster_of.items():
        clusters[path].append(learner)
    return clusters


def _as_path(value: str) -> str:
    parts = [re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:31].strip("-") for part in value.split("/")]
    path = "/".join(part for part in parts if part)
    if not path or len(parts) > _DEEPEST:
        raise InvalidInputError(f"the label '{value[:80]}' cannot name a cluster - use letters and digits")
    _check_path(path)
    return path


def _check_path(path: str) -> None:
    if path == _ROOT:
        raise InvalidInputError(f"no cluster can be called '{_ROOT}', the root is - choose another name")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
