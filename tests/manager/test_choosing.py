from dataclasses import dataclass

import pytest

from flops.core.errors import InvalidInputError
from flops.manager.choosing import sites


@dataclass(frozen=True)
class Piece:
    site: str
    num_examples: int


def test_every_site_with_data_gives_one_learner() -> None:
    fragments = [("", Piece("b", 5)), ("", Piece("a", 10)), ("", Piece("b", 1))]
    assert sites(fragments, ["x"], None) == [
        {"site": "a", "num_examples": 10, "node": ""},
        {"site": "b", "num_examples": 6, "node": ""},
    ]
    assert sites(fragments, ["x"], 1) == [{"site": "a", "num_examples": 10, "node": ""}]


def test_no_fragment_matches_the_tags() -> None:
    with pytest.raises(InvalidInputError) as caught:
        sites([], ["x", "y"], None)
    assert str(caught.value) == (
        "no fragment is tagged 'x', 'y' - put data with 'flops data put', or use --mock"
    )


def test_more_learners_than_sites() -> None:
    with pytest.raises(InvalidInputError) as caught:
        sites([("", Piece("local", 9))], ["x"], 3)
    assert str(caught.value) == (
        "3 learners are asked for, but only 1 site has fragments tagged 'x' (local) - put data for more "
        "sites with 'flops data put --site', or use --mock"
    )


def test_a_learner_has_the_node_of_its_site() -> None:
    fragments = [("n1", Piece("a", 5)), ("n2", Piece("b", 1)), ("n1", Piece("a", 2))]
    assert [(one["site"], one["node"]) for one in sites(fragments, [], None)] == [("a", "n1"), ("b", "n2")]


def test_a_site_on_two_nodes_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        sites([("n1", Piece("a", 5)), ("n2", Piece("a", 1))], ["x"], None)
    assert str(caught.value) == (
        "site 'a' has data on several nodes (n1, n2) - a learner trains on one node: put them under "
        "different sites"
    )
