from typing import Any

from flops.core.ids import LearnerId
from flops.core.spec import ProjectSpec, spec_from_mapping
from flops.manager.clustering import with_ancestors
from flops.manager.rows import Learner
from flops.manager.topology import Aggregator, Seat, aggregators

NESTED = ("europe/north", "america", "europe/north", "europe/south")


def spec(**training: Any) -> ProjectSpec:
    return spec_from_mapping({"repo": "/r", "training": training})


def formed(wanted: ProjectSpec, paths: tuple[str | None, ...], rounds: int = 3) -> dict[Any, Aggregator]:
    learners = [
        Learner(LearnerId(f"learner-{n}"), n, f"site-{n}", cluster=path) for n, path in enumerate(paths, 1)
    ]
    examples = {learner.site: 10 * learner.number for learner in learners}
    numbers = {path: n for n, path in enumerate(with_ancestors([path for path in paths if path]), start=1)}
    return {one.cluster: one for one in aggregators(wanted, learners, examples, rounds, numbers)}


def test_a_classic_training_has_one_aggregator_with_all_learners_in_their_places() -> None:
    wanted = spec(rounds=4, cohort="availability", over_sample=1.5, eject_after=5, max_update_norm=2.0)
    (root,) = formed(wanted, (None, None), rounds=6).values()
    assert root.seats == {"learner-1": Seat("learner", 1, 10), "learner-2": Seat("learner", 2, 20)}
    plan = root.plan
    assert (plan.rounds, plan.cohort, plan.over_sample) == (6, "availability", 1.5)
    assert (plan.eject_after, plan.max_update_norm, plan.cycles) == (5, 2.0, 1)


def test_a_cluster_of_clusters_has_them_as_members_and_passes_on() -> None:
    wanted = spec(mode="hierarchical", rounds=2, cycles=3, round_deadline_s=10.0)
    found = formed(wanted, NESTED)
    assert list(found) == [None, "america", "europe", "europe/north", "europe/south"]
    assert found[None].seats == {"america": Seat("cluster", 2, 20), "europe": Seat("cluster", 1, 80)}
    assert found["europe"].seats == {
        "europe/north": Seat("cluster", 1, 40),
        "europe/south": Seat("cluster", 4, 40),
    }
    assert list(found["europe/north"].seats) == ["learner-1", "learner-3"]
    assert [one.parent for one in found.values()] == [None, None, None, "europe", "europe"]
    assert [one.number for one in found.values()] == [None, 1, 2, 3, 4]
    rounds = [(one.plan.rounds, one.plan.cycles) for one in found.values()]
    assert rounds == [(3, 3), (2, 3), (1, 3), (2, 3), (2, 3)]
    # A cluster may wait for its members in each of its rounds, to train and to evaluate.
    assert [one.plan.round_deadline_s for one in found.values()] == [80.0, 10.0, 40.0, 10.0, 10.0]


def test_the_largest_bound_is_unknown_where_one_of_the_sum_is() -> None:
    learners = [
        Learner(LearnerId("learner-1"), 1, "a", cluster="x"),
        Learner(LearnerId("l-2"), 2, "b", cluster="x"),
    ]
    found = aggregators(spec(mode="hierarchical"), learners, {"a": 10, "b": None}, 1, {"x": 1})
    assert found[0].seats == {"x": Seat("cluster", 1, None)}


def test_each_strategy_works_where_what_it_compares_meets() -> None:
    expected = {
        "FedAdam": ("FedAdam", "FedAvg", "FedAvg"),
        "FedProx": ("FedProx", "FedProx", "FedProx"),
        "FedAvg": ("FedAvg", "FedAvg", "FedAvg"),
        "Krum": ("FedAvg", "FedAvg", "Krum"),
        "FedMedian": ("FedAvg", "FedAvg", "FedMedian"),
    }
    for name, strategies in expected.items():
        found = formed(spec(mode="hierarchical", strategy={"name": name, "parameters": {"p": 1}}), NESTED)
        levels = [found[path].plan for path in (None, "europe", "europe/north")]
        assert tuple(plan.strategy for plan in levels) == strategies
        assert all(bool(plan.strategy_parameters) == (plan.strategy == name) for plan in levels)


def test_minimums_of_learners_hold_inside_clusters_and_those_of_clusters_at_the_root() -> None:
    wanted = spec(mode="hierarchical", min_fit_learners=2, min_clusters=2, fraction_evaluate=0.0, quorum=1)
    found = formed(wanted, ("a", "a", "b", "b"))
    assert (found[None].plan.min_fit_learners, found[None].plan.quorum) == (2, None)
    assert found[None].plan.fraction_evaluate == 0.0
    assert (found["a"].plan.min_fit_learners, found["a"].plan.quorum) == (2, 1)


def test_the_least_number_of_clusters_is_no_more_than_a_cluster_of_clusters_has() -> None:
    found = formed(spec(mode="hierarchical", min_clusters=2), ("e/a", "f"))
    assert found[None].plan.min_fit_learners == 2
    assert found["e"].plan.min_fit_learners == 1


def test_a_root_that_places_its_learners_itself_lets_any_of_them_into_any_cluster() -> None:
    wanted = spec(clusters={"by": "latency", "count": 2})
    learners = [Learner(LearnerId(f"learner-{n}"), n, f"site-{n}") for n in (1, 2, 3)]
    examples = {learner.site: 10 for learner in learners}
    root, *clusters = aggregators(wanted, learners, examples, 3, {"cluster-1": 1, "cluster-2": 2})
    assert root.seats == {"cluster-1": Seat("cluster", 1, 30), "cluster-2": Seat("cluster", 2, 30)}
    assert [list(one.seats) for one in clusters] == [["learner-1", "learner-2", "learner-3"]] * 2
    placed = [Learner(one.learner, one.number, one.site, cluster="cluster-1") for one in learners]
    assert aggregators(wanted, placed, examples, 3, {"cluster-1": 1, "cluster-2": 2}) == [root, *clusters]
