"""Hierarchies: clusters are real aggregators in threads of this process, learners speak the real protocol."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flops.core.errors import FailedError
from flops.federation import Member

Start = Callable[..., Any]
Clusters = Callable[..., Any]
RunningCluster = Any
Federation = Any
EVERYBODY = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}
Read = Callable[[Path], list[np.ndarray[Any, Any]]]


def _fit(seed: int, examples: int) -> Callable[[Any, int], tuple[Any, int]]:
    """Training that depends on the parameters, the learner and the round, as real training does."""

    def fit(parameters: Any, round_number: int) -> tuple[Any, int]:
        random = np.random.default_rng([seed, round_number])
        return [(p * 0.9 + random.standard_normal(p.shape)).astype(p.dtype) for p in parameters], examples

    return fit


def _root(start: Start, clusters: int, **plan: Any) -> Federation:
    return start(members={f"c{number}": clusters_slot(number) for number in range(clusters)}, **plan)


def clusters_slot(number: int) -> Member:
    return Member(f"token-of-c{number}", slot=10 * number + 1, kind="cluster")


LEARNERS = {"a": 1, "b": 2, "c": 11, "d": 12}
EXAMPLES = {"a": 10, "b": 33, "c": 7, "d": 50}


def _learners(*clusters: RunningCluster) -> None:
    for running in clusters:
        for name, member in running.members.items():
            running.learner(
                name,
                fit=_fit(member.slot, EXAMPLES[name]),
                evaluate=lambda parameters, _, n=EXAMPLES[name]: (
                    float(np.abs(parameters[0]).mean()),
                    0.5,
                    n,
                ),
            )


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam"])
def test_one_round_a_cycle_equals_flat_averaging(start: Start, cluster: Clusters, strategy: str) -> None:
    arrays = [np.random.default_rng(0).standard_normal((300, 1000), np.float32), np.arange(4.0)]
    root = _root(start, 2, rounds=3, arrays=arrays, strategy=strategy, **EVERYBODY)
    inner = {"rounds": 1, "cycles": 3}
    _learners(
        cluster(root, "c0", {"a": 1, "b": 2}, **inner), cluster(root, "c1", {"c": 11, "d": 12}, **inner)
    )
    hierarchical = root.result()
    flat = start(
        members={name: Member(f"token-of-{name}", slot=slot) for name, slot in LEARNERS.items()},
        rounds=3,
        strategy=strategy,
    )
    for name, slot in LEARNERS.items():
        flat.learner(
            name,
            fit=_fit(slot, EXAMPLES[name]),
            evaluate=lambda parameters, _, n=EXAMPLES[name]: (float(np.abs(parameters[0]).mean()), 0.5, n),
        )
    expected = flat.result()
    for one, other in zip(root.model(), flat.model(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        assert one.dtype == other.dtype
    assert hierarchical.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-6)


def test_cycles_of_rounds_reach_every_learner_in_one_session(start: Start, cluster: Clusters) -> None:
    root = _root(start, 2, rounds=3, fraction_evaluate=0.0, **EVERYBODY)
    seen: dict[str, list[int]] = {}

    def note(name: str) -> Callable[[Any, int], tuple[Any, int]]:
        def fit(parameters: Any, round_number: int) -> tuple[Any, int]:
            seen.setdefault(name, []).append(round_number)
            return [p + 1 for p in parameters], 10

        return fit

    inner = {"rounds": 5, "cycles": 3}
    first = cluster(root, "c0", {"a": 1, "b": 2}, **inner)
    second = cluster(root, "c1", {"c": 11}, **inner)
    for running, names in ((first, "ab"), (second, "c")):
        for name in names:
            running.learner(name, fit=note(name))
    outcome = root.result()
    assert outcome.rounds == 3
    assert seen == {name: list(range(1, 16)) for name in "abc"}
    np.testing.assert_array_equal(root.model()[0], np.full((3, 2), 15.0, np.float32))
    assert [data["cycle"] for data in root.reports("round.finished")] == [1, 2, 3]
    rounds = first.reports("cluster.round")
    assert [(data["cycle"], data["round"]) for data in rounds] == [
        (cycle, 5 * (cycle - 1) + number) for cycle in (1, 2, 3) for number in range(1, 6)
    ]
    assert len(first.reports("learner.connected")) == 2


def test_clusters_nest_and_mix_with_learners(start: Start, cluster: Clusters, tmp_path: Path) -> None:
    """A root over one learner and one cluster, which lies over a cluster and a learner."""
    members = {
        "a": Member("token-of-a", slot=1),
        "europe": Member("token-of-europe", slot=2, kind="cluster"),
    }
    root = start(members=members, rounds=2, fraction_evaluate=0.0, **EVERYBODY)
    more = {"north": Member("token-of-north", slot=3, kind="cluster")}
    europe = cluster(root, "europe", {"b": 2}, more, rounds=1, cycles=2, min_fit_learners=2)
    north = cluster(europe, "north", {"c": 3, "d": 4}, rounds=1, cycles=2)
    root.learner("a", fit=lambda p, _: ([x + 1 for x in p], 10))
    europe.learner("b", fit=lambda p, _: ([x + 2 for x in p], 10))
    north.learner("c", fit=lambda p, _: ([x + 3 for x in p], 10))
    north.learner("d", fit=lambda p, _: ([x + 6 for x in p], 30))
    root.result()
    mean = (1 * 10 + 2 * 10 + 3 * 10 + 6 * 30) / 60
    np.testing.assert_allclose(root.model()[0], np.full((3, 2), 2 * mean, np.float32), rtol=1e-6)


def test_a_cluster_without_learners_is_left_out_with_its_reason(start: Start, cluster: Clusters) -> None:
    root = _root(start, 2, rounds=2, start_deadline_s=1.5, **EVERYBODY)
    full = cluster(root, "c0", {"a": 1}, rounds=2, cycles=2)
    cluster(root, "c1", {"c": 11}, rounds=2, cycles=2)
    full.learner("a")
    root.result()
    for data in root.reports("round.finished"):
        assert data["participants"] == 1
        assert data["left_out"]["c1"].startswith("0 of its 1 members are connected, it needs 1")


def test_a_cluster_whose_learners_fail_is_left_out_and_the_cycle_goes_on(
    start: Start, cluster: Clusters
) -> None:
    root = _root(start, 2, rounds=2, fraction_evaluate=0.0, **EVERYBODY)
    inner = {"rounds": 2, "cycles": 2}
    good, bad = cluster(root, "c0", {"a": 1}, **inner), cluster(root, "c1", {"c": 11}, **inner)
    good.learner("a")
    bad.learner("c", fit=lambda parameters, _: ([p * np.float32("nan") for p in parameters], 10))
    root.result()
    first = root.reports("round.finished")[0]
    assert "it contains NaN or infinite values" in first["left_out"]["c1"]
    assert first["participants"] == 1
    np.testing.assert_array_equal(root.model()[0], np.full((3, 2), 4.0, np.float32))


def test_an_answer_of_a_cluster_must_have_the_layout_of_a_sum(start: Start) -> None:
    """A cluster that returns a plain model would count as a sum: it is refused before a byte of it counts."""
    root = _root(start, 2, rounds=1, **EVERYBODY)
    root.learner("c0")
    root.learner("c1")
    assert "its parameters are not those that were asked for" in root.failure()


def test_robust_strategies_work_inside_clusters(start: Start, cluster: Clusters, read_model: Read) -> None:
    root = _root(start, 1, rounds=1, **EVERYBODY)
    inner = cluster(root, "c0", {"a": 1, "b": 2, "c": 3}, rounds=2, cycles=1, strategy="FedMedian")
    for name, step in (("a", 1.0), ("b", 2.0), ("c", 1000.0)):
        inner.learner(name, fit=lambda p, _, step=step: ([x + np.float32(step) for x in p], 10))
    root.result()
    np.testing.assert_array_equal(root.model()[0], np.full((3, 2), 4.0, np.float32))
    assert read_model(inner.state / "update-1.safetensors")[0].dtype == np.float64


def test_robust_strategies_are_refused_above_clusters(start: Start) -> None:
    with pytest.raises(FailedError, match="use it inside clusters"):
        _root(start, 1, rounds=1, strategy="FedMedian", **EVERYBODY)
