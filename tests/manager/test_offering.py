"""What joined nodes offer a project, and whose words come first where two claim the same site."""

from typing import Any

from flops.core.ids import ProjectId
from flops.core.spec import spec_from_mapping
from flops.fleet import JoinedNode
from flops.manager.choosing import Offered, Offers
from flops.manager.offering import offers_of
from flops.manager.rows import Project
from flops.manager.states import State

NOW = 1000.0
REPO = "https://git.example.org/lab/mnist"


def node(
    name: str, *, joined: float = 0.0, seen: float = NOW, tags: Any = ("xray",), **allows: Any
) -> JoinedNode:
    holding = {"site": f"site-of-{name}", "tags": list(tags), "num_examples": 5, "labels": {}}
    return JoinedNode(
        *(name, "dora", "0" * 12, "linux/amd64", 2, 4000, "1", joined, seen, None, None),
        allowance={kind: list(words) for kind, words in allows.items()},
        holdings=[holding],
        number=0,
    )


def offers(*nodes: JoinedNode, images: bool = False, **training: Any) -> Offers:
    spec = spec_from_mapping({"repo": REPO, "data": {"tags": ["xray"]}, "training": training})
    project = Project(
        *(ProjectId("p-222222"), "mnist", State.PREPARING, None, {}, REPO, 0.0, 0.0, None, 0, 0, None, 0, 3),
        *(None, None, None, False, "ann", "vision"),
    )
    return offers_of(nodes, project, spec, NOW, images=images)


def test_nodes_offer_what_their_owners_allow() -> None:
    found = offers(
        node("open"),
        node("team", teams=["vision"]),
        node("other", owners=["bob"]),
        node("code", repositories=["https://git.example.org/other/*"]),
        node("tag", tags=["ct"]),
    )
    assert [one.node for one in found.offered] == ["open", "team"]
    assert len(found.refusals) == 2
    assert "node code (site-of-code) does not take part: code of" in found.refusals[0]
    assert "node other (site-of-other) does not take part: projects of 'ann'" in found.refusals[1]


def test_a_node_that_is_away_is_named() -> None:
    found = offers(node("clinic", seen=NOW - 31))
    assert found == Offers((), ("node clinic (site-of-clinic) does not take part: it is away",))


def test_projects_that_cannot_reach_joined_nodes_say_so() -> None:
    for found in (offers(node("clinic"), images=True), offers(node("clinic"), virtual=True)):
        assert found.offered == ()
        assert "node clinic (site-of-clinic) does not take part: " in found.refusals[0]


def test_a_name_of_a_site_belongs_to_who_had_it_first() -> None:
    one = Offered("clinic", "north", ("xray",), 5, {})
    found, told = Offers((one, Offered("farm", "north", ("xray",), 9, {}))).beside(["west"])
    assert found.offered == (one,)
    assert told == ["site 'north' of node farm is left out: a site of this name is on node clinic"]
    found, told = Offers((one,)).beside(["north"])
    assert found.offered == ()
    assert told == ["site 'north' of node clinic is left out: a site of this name is there already"]


def test_offers_survive_the_way_to_a_step() -> None:
    from dataclasses import asdict

    found = offers(node("clinic"))
    assert Offers.of(asdict(found)) == found
    assert Offers.of(None) == Offers()
