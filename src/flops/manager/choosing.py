"""Who learns: from what the nodes hold to the sites whose data are trained on."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flops.core.errors import InvalidInputError
from flops.core.ids import ProjectId


class Fragment(Protocol):
    """What is read of a fragment here."""

    @property
    def site(self) -> str: ...
    @property
    def num_examples(self) -> int: ...


OFFERS = "offers"
"""Argument of steps: what joined nodes offer a project, as `Offers` writes it."""


@dataclass(frozen=True)
class Offered:
    """What a site of a joined node holds under some tags, as its node says."""

    node: str
    site: str
    tags: tuple[str, ...]
    num_examples: int
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Offers:
    """What joined nodes offer a project, and why others that hold such data do not."""

    offered: tuple[Offered, ...] = ()
    refusals: tuple[str, ...] = ()

    @classmethod
    def of(cls, said: Mapping[str, Any] | None) -> "Offers":
        said = said or {}
        offered = (Offered(**{**one, "tags": tuple(one["tags"])}) for one in said.get("offered", ()))
        return cls(tuple(offered), tuple(said.get("refusals", ())))

    def tagged(self, tags: Collection[str]) -> list[Offered]:
        return [one for one in self.offered if not tags or set(tags).intersection(one.tags)]

    def beside(self, taken: Iterable[str]) -> tuple["Offers", list[str]]:
        """Those of sites that nobody else has, and what to tell of the others.

        A node says by itself what its sites are called: it must not be able to get others' into its way.

        Args:
            taken: sites whose data lie elsewhere.
        """
        where = dict.fromkeys(taken, "")
        kept, told = [], []
        for one in self.offered:
            if where.setdefault(one.site, one.node) == one.node:
                kept.append(one)
            else:
                other = where[one.site]
                told.append(
                    f"site '{one.site}' of node {one.node} is left out: a site of this name is "
                    + (f"on node {other}" if other else "there already")
                )
        return Offers(tuple(kept), self.refusals), list(dict.fromkeys(told))


def mock_tag(project: ProjectId) -> str:
    """The tag of the data that were made for this project alone."""
    return f"mock-{project}"


def sites(
    fragments: Sequence[tuple[str, Fragment]],
    tags: Sequence[str],
    wanted: int | None,
    refusals: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The sites whose data are trained on, by name, each with its number of examples and its node.

    Args:
        fragments: each with its node.
        wanted: how many learners; None: every site with data.
        refusals: why others who hold such data do not take part.
    Raises:
        InvalidInputError: no site, or fewer than wanted, hold matching data.
    """
    examples: dict[str, int] = {}
    nodes: dict[str, str] = {}
    for node, fragment in fragments:
        examples[fragment.site] = examples.get(fragment.site, 0) + fragment.num_examples
        if nodes.setdefault(fragment.site, node) != node:
            raise InvalidInputError(
                f"site '{fragment.site}' has data on several nodes ({nodes[fragment.site]}, {node}) - a "
                "learner trains on one node: put them under different sites"
            )
    tagged = "tagged " + ", ".join(f"'{tag}'" for tag in tags) if tags else "at all"
    others = f"; {'; '.join(refusals[:5])}" if refusals else ""
    if not examples:
        raise InvalidInputError(
            f"no fragment {'is ' + tagged if tags else 'is there at all'}{others} - put data with "
            "'flops data put', or use --mock"
        )
    if wanted is not None and wanted > len(examples):
        names = ", ".join(sorted(examples))
        only = "only 1 site has" if len(examples) == 1 else f"only {len(examples)} sites have"
        raise InvalidInputError(
            f"{wanted} learners are asked for, but {only} fragments {tagged} ({names}){others} - "
            "put data for more sites with 'flops data put --site', or use --mock"
        )
    chosen = sorted(examples)[: wanted or None]
    return [{"site": site, "num_examples": examples[site], "node": nodes[site]} for site in chosen]
