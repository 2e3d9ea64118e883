import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.core.spec import ClustersSpec, TrainingSpec
from flops.manager.clustering import Candidate, Clusters, check_minimums, form, how_many, with_ancestors


def candidates(sites: list[str], **labels: list[str]) -> list[Candidate]:
    return [
        Candidate(
            f"learner-{number}",
            site,
            {name: frozenset(values[number - 1].split("|")) for name, values in labels.items()},
        )
        for number, site in enumerate(sites, start=1)
    ]


def check_law(clusters: Clusters, members: list[Candidate], count: int) -> None:
    learners = [learner for some in clusters.values() for learner in some]
    assert sorted(learners) == sorted(one.learner for one in members)
    sizes = {len(some) for some in clusters.values()}
    assert len(clusters) == count
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_every_learner_is_in_one_cluster_and_sizes_differ_by_one_at_most(
    learners: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, learners))
    histograms = st.none() | st.dictionaries(st.sampled_from("abcd"), st.integers(-5, 100))
    members = [
        Candidate(f"learner-{number}", f"site-{number}", {}, data.draw(histograms))
        for number in range(1, learners + 1)
    ]
    for by in ("size", "distribution"):
        spec = ClustersSpec(by=by, count=count)
        clusters = form(spec, members)
        check_law(clusters, members, count)
        assert clusters == form(spec, members)


@given(st.integers(1, 500))
def test_without_a_wish_there_are_as_many_clusters_as_learners_in_one(learners: int) -> None:
    assert how_many(ClustersSpec(), learners) == max(1, round(math.sqrt(learners)))
    assert how_many(ClustersSpec(size=7), learners) == math.ceil(learners / 7)


def test_equal_clusters_are_neighbours() -> None:
    clusters = form(ClustersSpec(count=3), candidates(list("abcdefg")))
    assert clusters == {
        "cluster-1": ["learner-1", "learner-2", "learner-3"],
        "cluster-2": ["learner-4", "learner-5"],
        "cluster-3": ["learner-6", "learner-7"],
    }


def test_more_clusters_than_learners_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="count is 3, but there are only 2 learners - lower it"):
        form(ClustersSpec(count=3), candidates(["a", "b"]))


def test_groups_name_sites_or_learners() -> None:
    spec = ClustersSpec(groups={"europe/north": ["oslo", "learner-3"], "america": ["lima"]})
    assert form(spec, candidates(["lima", "oslo", "bergen"])) == {
        "america": ["learner-1"],
        "europe/north": ["learner-2", "learner-3"],
    }


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (
            {"a": ["oslo", "rome"], "b": ["lima"]},
            "puts 'rome' into cluster a, but no chosen site is called so",
        ),
        ({"a": ["oslo"], "b": ["learner-1"]}, "puts 'learner-1' into clusters a and b - leave it in one"),
        ({"a": ["oslo"]}, "has no cluster for lima - add it to one"),
        ({"aggregator": ["oslo", "lima"]}, "no cluster can be called 'aggregator'"),
    ],
)
def test_groups_that_do_not_fit_the_sites_are_refused(groups: dict[str, list[str]], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        form(ClustersSpec(groups=groups), candidates(["oslo", "lima"]))


def test_a_label_makes_a_cluster_of_each_of_its_values() -> None:
    members = candidates(["a", "b", "c"], region=["Europe/North Sea", "asia", "Europe/North Sea"])
    assert form(ClustersSpec(label="region"), members) == {
        "asia": ["learner-2"],
        "europe/north-sea": ["learner-1", "learner-3"],
    }


@pytest.mark.parametrize(
    ("regions", "problem"),
    [
        (["north|south", "x"], "site 'a' has the labels 'north' and 'south' for 'region'"),
        (["a b", "a-b"], "the values 'a b' and 'a-b' of label 'region' would both be cluster a-b"),
        (["...", "x"], "the label '...' cannot name a cluster"),
    ],
)
def test_labels_that_name_no_single_cluster_are_refused(regions: list[str], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        form(ClustersSpec(label="region"), candidates(["a", "b"], region=regions))
    with pytest.raises(InvalidInputError, match="site 'a' has no label for 'speed'"):
        form(ClustersSpec(label="speed"), candidates(["a", "b"], region=regions))


def test_clusters_by_distribution_have_a_share_of_every_class() -> None:
    # Every site has one class only, in the order that would put equal ones together.
    members = [
        Candidate(f"learner-{n}", f"s{n}", {}, {"abc"[(n - 1) // 4]: 50 + n % 3}) for n in range(1, 13)
    ]
    clusters = form(ClustersSpec(by="distribution", count=4), members)
    class_of = {one.learner: next(iter(one.histogram or {})) for one in members}
    assert [sorted(class_of[learner] for learner in some) for some in clusters.values()] == [list("abc")] * 4


def test_a_cluster_below_its_minimum_is_named() -> None:
    clusters = {"europe/north": ["learner-1"], "asia": ["learner-2", "learner-3"]}
    with pytest.raises(
        InvalidInputError, match="cluster europe/north has 1 learner, but a round inside a cl"
    ):
        check_minimums(clusters, TrainingSpec(min_fit_learners=2), 3)
    with pytest.raises(InvalidInputError, match=r"min_clusters is 3, but there are 2 \(asia, europe\)"):
        check_minimums(clusters, TrainingSpec(min_clusters=3), 3)
    check_minimums(clusters, TrainingSpec(min_clusters=2), 3)


def test_outer_clusters_come_before_inner_ones() -> None:
    assert with_ancestors(["europe/north/oslo", "asia", "europe/south"]) == [
        "asia",
        "europe",
        "europe/north",
        "europe/north/oslo",
        "europe/south",
    ]


def test_clusters_by_latency_are_empty_until_the_root_has_measured_and_checked_by_their_share() -> None:
    clusters = form(ClustersSpec(by="latency", count=2), candidates(list("abcde")))
    assert clusters == {"cluster-1": [], "cluster-2": []}
    check_minimums(clusters, TrainingSpec(min_fit_learners=2), 5)
    with pytest.raises(InvalidInputError, match="cluster cluster-1 has 2 learners, but a round inside a cl"):
        check_minimums(clusters, TrainingSpec(min_fit_learners=3), 5)
