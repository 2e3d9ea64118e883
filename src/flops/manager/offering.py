"""What joined nodes offer a project: the data that they hold under its tags, where their owners allow it and
the project is one that can reach them. A pure function of what was seen.
"""

from collections.abc import Sequence

from flops.core.spec import ProjectSpec
from flops.fleet import JoinedNode
from flops.manager.choosing import Offered, Offers
from flops.manager.rows import Project
from flops.manager.topology import places_itself


def offers_of(
    nodes: Sequence[JoinedNode], project: Project, spec: ProjectSpec, now: float, *, images: bool
) -> Offers:
    """What the nodes that hold data under the project's tags offer.

    Args:
        images: the manager's own orchestrator runs images.
    """
    offered: list[Offered] = []
    refusals: list[str] = []
    # Who came first keeps the names of its sites.
    for node in sorted(nodes, key=lambda node: (node.joined, node.name)):
        held = [one for one in node.holdings if set(one["tags"]).intersection(spec.data.tags)]
        if not held:
            continue
        why = _impossible(spec, images=images)
        if why is None and not node.ready(now):
            why = "it is away"
        if why is None:
            why = node.consent.refusal(
                owner=project.owner, team=project.team, repository=project.source, tags=spec.data.tags
            )
        if why is not None:
            sites = ", ".join(sorted({str(one["site"]) for one in held})[:5])
            refusals.append(f"node {node.name} ({sites}) does not take part: {why}")
            continue
        offered += [
            Offered(node.name, one["site"], tuple(one["tags"]), one["num_examples"], one["labels"])
            for one in held
        ]
    return Offers(tuple(offered), tuple(refusals))


def _impossible(spec: ProjectSpec, *, images: bool) -> str | None:
    """Why no joined node can take part in such a project."""
    if images:
        return "projects run as images here, and joined nodes run programs - use the orchestrator 'process'"
    if spec.training.virtual:
        return "virtual learners share processes of this machine - leave training.virtual out"
    if places_itself(spec):
        return "clusters by latency need learners that may connect anywhere - form them another way"
    return None
