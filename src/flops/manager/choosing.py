"""Who learns: from the fragments that a node holds to the sites whose data are trained on."""

from collections.abc import Sequence
from typing import Any, Protocol

from flops.core.errors import InvalidInputError
from flops.core.ids import ProjectId


class Fragment(Protocol):
    """What is read of a fragment here."""

    @property
    def site(self) -> str: ...
    @property
    def num_examples(self) -> int: ...


def mock_tag(project: ProjectId) -> str:
    """The tag of the data that were made for this project alone."""
    return f"mock-{project}"


def sites(
    fragments: Sequence[tuple[str, Fragment]], tags: Sequence[str], wanted: int | None
) -> list[dict[str, Any]]:
    """The sites whose data are trained on, by name, each with its number of examples and its node.

    Args:
        fragments: each with its node.
        wanted: how many learners; None: every site with data.
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
    if not examples:
        raise InvalidInputError(
            f"no fragment {'is ' + tagged if tags else 'is there at all'} - put data with "
            "'flops data put', or use --mock"
        )
    if wanted is not None and wanted > len(examples):
        names = ", ".join(sorted(examples))
        only = "only 1 site has" if len(examples) == 1 else f"only {len(examples)} sites have"
        raise InvalidInputError(
            f"{wanted} learners are asked for, but {only} fragments {tagged} ({names}) - "
            "put data for more sites with 'flops data put --site', or use --mock"
        )
    chosen = sorted(examples)[: wanted or None]
    return [{"site": site, "num_examples": examples[site], "node": nodes[site]} for site in chosen]
