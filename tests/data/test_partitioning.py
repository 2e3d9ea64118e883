import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.data import dirichlet, iid, shards
from flops.data.partitioning import Indices

SEEDS = st.integers(0, 2**63)
LABELS = st.lists(st.integers(0, 9), min_size=1, max_size=200)
ALPHAS = st.floats(1e-6, 1e9)


def assert_is_partition(parts: list[Indices], num_examples: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_examples))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@given(st.data(), st.integers(1, 500), SEEDS)
def test_iid_gives_every_example_to_one_site_in_parts_of_equal_size(
    data: st.DataObject, num_examples: int, seed: int
) -> None:
    num_sites = data.draw(st.integers(1, num_examples))
    parts = iid(num_examples, num_sites, seed)
    assert len(parts) == num_sites
    assert_is_partition(parts, num_examples)


@given(st.data(), LABELS, ALPHAS, SEEDS)
def test_dirichlet_gives_every_example_to_one_site_in_parts_of_equal_size(
    data: st.DataObject, labels: list[int], alpha: float, seed: int
) -> None:
    num_sites = data.draw(st.integers(1, len(labels)))
    parts = dirichlet(labels, num_sites, alpha, seed)
    assert len(parts) == num_sites
    assert_is_partition(parts, len(labels))


@given(st.data(), LABELS, SEEDS)
def test_shards_give_every_example_to_one_site_in_parts_of_equal_size(
    data: st.DataObject, labels: list[int], seed: int
) -> None:
    each = data.draw(st.integers(1, min(5, len(labels))))
    num_sites = data.draw(st.integers(1, len(labels) // each))
    parts = shards(labels, num_sites, each, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert len(sizes) == num_sites
    assert min(sizes) >= each
    assert max(sizes) - min(sizes) <= each
    # Sorted by label, there are C - 1 places where a label ends; no more than that can fall inside shards.
    seen = [len(set(np.asarray(labels)[part])) for part in parts]
    assert sum(seen) <= num_sites * each + len(set(labels)) - 1
    if len(labels) // (num_sites * each) + 1 <= np.unique(labels, return_counts=True)[1].min():
        assert max(seen) <= 2 * each
    for one, other in zip(parts, shards(labels, num_sites, each, seed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_shards_of_labels_that_fill_whole_shards_are_at_most_two_labels() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    parts = shards(labels, 100, 2, 0)
    assert {len(part) for part in parts} == {600}
    assert max(len(set(labels[part])) for part in parts) == 2
    assert not np.array_equal(parts[0], shards(labels, 100, 2, 1)[0])


@given(LABELS, ALPHAS, SEEDS)
def test_the_same_seed_gives_the_same_parts(labels: list[int], alpha: float, seed: int) -> None:
    sites = min(3, len(labels))
    for one, other in zip(
        dirichlet(labels, sites, alpha, seed) + iid(len(labels), sites, seed),
        dirichlet(labels, sites, alpha, seed) + iid(len(labels), sites, seed),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_other_seeds_give_other_parts() -> None:
    labels = np.arange(1000) % 10
    assert not np.array_equal(iid(1000, 4, 0)[0], iid(1000, 4, 1)[0])
    assert not np.array_equal(dirichlet(labels, 4, 0.5, 0)[0], dirichlet(labels, 4, 0.5, 1)[0])


def shares(parts: list[Indices], labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[float]:
    """For each site, the share of its most frequent label."""
    return [float(np.bincount(labels[part]).max() / len(part)) for part in parts]


def test_alpha_leads_from_one_label_a_site_to_iid() -> None:
    labels = np.repeat(np.arange(10), 1000)
    skewed = np.median(shares(dirichlet(labels, 10, 1e-3, 0), labels))
    middle = np.median(shares(dirichlet(labels, 10, 0.5, 0), labels))
    even = np.median(shares(dirichlet(labels, 10, 1e6, 0), labels))
    assert skewed > 0.95
    assert 0.2 < middle < 0.8
    assert even < 0.15


def test_the_first_site_follows_the_dirichlet_distribution() -> None:
    # Mean and variance of Dirichlet(alpha * C * p), of the first site, which no exhausted label disturbs.
    labels = np.repeat([0, 1, 2], [6000, 3000, 3000])
    alpha, prior = 2.0, np.array([0.5, 0.25, 0.25])
    drawn = np.array(
        [np.bincount(labels[dirichlet(labels, 40, alpha, seed)[0]], minlength=3) / 300 for seed in range(600)]
    )
    variance = prior * (1 - prior) / (3 * alpha + 1)
    sampling = (prior * (1 - prior) - variance) / 300
    np.testing.assert_allclose(drawn.mean(axis=0), prior, atol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), variance + sampling, rtol=0.2)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e-7])
def test_an_alpha_out_of_bounds_is_refused(alpha: float) -> None:
    with pytest.raises(InvalidInputError, match=r"alpha is .* - use a number from 1e-6 to 1e9"):
        dirichlet([0, 1], 1, alpha, 0)


def test_more_sites_than_examples_are_refused() -> None:
    message = "2 examples cannot be spread over 3 sites"
    with pytest.raises(InvalidInputError, match=message):
        iid(2, 3, 0)
    with pytest.raises(InvalidInputError, match=message):
        dirichlet([0, 1], 3, 1.0, 0)
    with pytest.raises(InvalidInputError, match="2 examples cannot be cut into 4 shards"):
        shards([0, 1], 2, 2, 0)
    with pytest.raises(InvalidInputError, match="0 shards a site were asked for"):
        shards([0, 1], 2, 0, 0)
    with pytest.raises(InvalidInputError, match="there is no site"):
        iid(2, 0, 0)
