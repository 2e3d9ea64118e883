"""How what joined nodes hold looks beside the fragments of data servers."""

from typing import Any

from flops.fleet import JoinedNode
from flops.manager.views import held_fragments, joined_node_view


def node(*holdings: dict[str, Any]) -> JoinedNode:
    return JoinedNode(
        *("clinic", "dora", "0" * 12, "linux/amd64", 2, 4000, "1", 5.0, 100.0, None, None),
        allowance={"tags": ["xray", "ct"]},
        holdings=[{"size_bytes": 9, "allow_metrics": False, "labels": {}, **one} for one in holdings],
        number=0,
    )


CLINIC = node(
    {"site": "north", "tags": ["xray"], "num_examples": 5},
    {"site": "south", "tags": ["ct", "xray"], "num_examples": 7},
)


def test_each_holding_is_shown_as_one_fragment_of_its_node() -> None:
    north, south = held_fragments([CLINIC], [], None)
    assert (north["site"], north["num_examples"], north["node"], north["owner"]) == (
        "north",
        5,
        "clinic",
        "dora",
    )
    assert north["id"] != south["id"]
    assert held_fragments([CLINIC], ["ct"], None) == [south]
    assert held_fragments([CLINIC], ["xray"], "north") == [north]
    assert held_fragments([CLINIC], ["mri"], None) == []


def test_a_node_is_shown_with_its_tags_and_what_it_allows() -> None:
    shown = joined_node_view(CLINIC, now=131.0)
    assert (shown["tags"], shown["ready"], shown["last_seen"]) == (["ct", "xray"], False, 100.0)
    assert shown["policy"] == {"tags": ["xray", "ct"], "owners": [], "teams": [], "repositories": []}
