"""The topology as SVG: root, clusters, learners; state by colour and by shape, data moved on the lines.

Few learners are drawn one by one with their names, many as a field of marks for each cluster. The table of
learners on the same page says the same.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from flops.web.words import clean, size

SHAPES: Mapping[str, str] = {
    "connected": "connected",
    "done": "done",
    "waiting": "waiting",
    "left": "left",
    "ejected": "ejected",
}
"""State by shape; each is drawn by the symbol of that name in the page's sprite."""
_MOST_NAMED = 40
_MOST_MARKS = 2000
_ROW, _GAP = 29.0, 14.0
_COLUMNS = 14
_MARK = 15.0
_ROOT_X, _STEP_X = 62.0, 152.0


@dataclass
class _Node:
    """An aggregator, with the clusters and learners below it."""

    name: str
    label: str
    state: str
    bytes_down: int
    bytes_up: int
    clusters: "list[_Node]" = field(default_factory=list)
    learners: list[Mapping[str, Any]] = field(default_factory=list)
    y: float = 0.0
    learners_y: float = 0.0
    """Where its learners begin."""


def shape_of(state: str) -> str:
    return SHAPES.get(state, "waiting")


def counts(learners: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """How many learners are in which state, in the order of the legend."""
    found = Counter(shape_of(str(learner["state"])) for learner in learners)
    return [(state, found[state]) for state in SHAPES if found[state]]


def topology(
    learners: Sequence[Mapping[str, Any]],
    clusters: Sequence[Mapping[str, Any]],
    moved: Mapping[str, tuple[int, int]],
    *,
    total: tuple[int, int],
    state: str,
) -> Markup:
    """The picture.

    Args:
        moved: bytes down and up of clusters by name.
        total: bytes down and up of the whole project.
        state: the project's; lines move while it trains.
    """
    root = _tree(learners, clusters, moved, total, state)
    named = len(learners) <= _MOST_NAMED
    depth = _depth(root)
    learner_x = _ROOT_X + depth * _STEP_X
    height = _place(root, 16.0, named)
    width = learner_x + (112.0 if named else _COLUMNS * _MARK + 10)
    lines: list[Markup] = []
    marks: list[Markup] = []
    _draw(root, 0, learner_x, named, lines, marks)
    told = (
        f"The root aggregator is {state}. "
        + (f"{len(clusters)} clusters, " if clusters else "")
        + f"{len(learners)} learners: "
        + ", ".join(f"{count} {word}" for word, count in counts(learners))
    )
    told += f". {size(total[0])} sent down, {size(total[1])} up."
    return Markup(
        '<svg class="topology{}" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" role="img" aria-label="{}">'
        "<title>Topology</title><desc>{}</desc>{}{}</svg>"
    ).format(
        " moving" if state == "training" else "",
        width,
        height,
        width,
        told,
        told,
        Markup("").join(lines),
        Markup("").join(marks),
    )


def _tree(
    learners: Sequence[Mapping[str, Any]],
    clusters: Sequence[Mapping[str, Any]],
    moved: Mapping[str, tuple[int, int]],
    total: tuple[int, int],
    state: str,
) -> _Node:
    shown = {"training": "connected", "packaging": "connected", "finished": "done", "failed": "ejected"}
    root = _Node("", "root", shown.get(state, "waiting"), *total)
    nodes = {"": root}
    for cluster in sorted(clusters, key=lambda one: str(one["id"])):
        name = str(cluster["id"])
        nodes[name] = _Node(
            name, name.rpartition("/")[2], shape_of(str(cluster["state"])), *moved.get(name, (0, 0))
        )
    for name, node in nodes.items():
        if name:
            nodes.get(name.rpartition("/")[0], root).clusters.append(node)
    for learner in learners:
        nodes.get(str(learner.get("cluster") or ""), root).learners.append(learner)
    return root


def _depth(node: _Node) -> int:
    return 1 + max((_depth(inner) for inner in node.clusters), default=0)


def _place(node: _Node, top: float, named: bool) -> float:
    """Set the height of the node and of all below it; answers where the next one begins."""
    begun = top
    for inner in node.clusters:
        top = _place(inner, top, named) + _GAP
    node.learners_y = top
    if node.learners and named:
        top += _ROW * len(node.learners)
    elif node.learners:
        top += _MARK * math.ceil(min(len(node.learners), _MOST_MARKS) / _COLUMNS) + 14
    short = begun + 2.4 * _ROW - top  # an aggregator's own words need that much
    if short > 0:
        node.learners_y += short / 2
        top += short
    node.y = (begun + top) / 2
    return top


def _draw(
    node: _Node,
    level: int,
    learner_x: float,
    named: bool,
    lines: list[Markup],
    marks: list[Markup],
) -> None:
    x = _ROOT_X + level * _STEP_X
    for inner in node.clusters:
        inner_x = x + _STEP_X
        lines.append(_line(x, node.y, inner_x, inner.y, inner.state, inner.bytes_down + inner.bytes_up))
        _draw(inner, level + 1, learner_x, named, lines, marks)
    marks.append(_aggregator(node, x))
    if not node.learners:
        return
    if named:
        for index, learner in enumerate(node.learners):
            y = node.learners_y + _ROW * (index + 0.5)
            shape = shape_of(str(learner["state"]))
            lines.append(_line(x, node.y, learner_x, y, shape, 0))
            marks.append(_learner(learner, shape, learner_x, y))
        return
    shown = node.learners[:_MOST_MARKS]
    rows = math.ceil(len(shown) / _COLUMNS)
    top = node.learners_y + _MARK / 2
    middle = top + (rows - 1) * _MARK / 2
    lines.append(_line(x, node.y, learner_x - 6, middle, node.state, node.bytes_down + node.bytes_up))
    for index, learner in enumerate(shown):
        shape = shape_of(str(learner["state"]))
        marks.append(
            Markup(
                '<g><title>{}: {}</title><use href="#shape-{}" class="state-{}" x="{:.1f}" y="{:.1f}" '
                'width="11" height="11"/></g>'
            ).format(
                clean(learner["id"], 80),
                learner["state"],
                shape,
                shape,
                learner_x + (index % _COLUMNS) * _MARK - 5.5,
                top + (index // _COLUMNS) * _MARK - 5.5,
            )
        )
    if len(node.learners) > len(shown):
        marks.append(
            Markup('<text class="small" x="{:.0f}" y="{:.0f}">and {} more</text>').format(
                learner_x, top + rows * _MARK + 8, len(node.learners) - len(shown)
            )
        )


def _line(x1: float, y1: float, x2: float, y2: float, state: str, moved: int) -> Markup:
    middle = (x1 + x2) / 2
    thick = 1.5 if not moved else min(6.0, 1.5 + math.log10(1 + moved / 1e5))
    return Markup(
        '<path class="wire state-{}" d="M{:.1f},{:.1f} C{:.1f},{:.1f} {:.1f},{:.1f} {:.1f},{:.1f}" '
        'stroke-width="{:.1f}"/>'
    ).format(state, x1 + 15, y1, middle, y1, middle, y2, x2 - 13, y2, thick)


def _aggregator(node: _Node, x: float) -> Markup:
    traffic = f"↓ {size(node.bytes_down)}  ↑ {size(node.bytes_up)}" if node.bytes_down + node.bytes_up else ""
    title = f"{clean(node.name, 200) or 'root aggregator'}: {node.state} {traffic}"
    return Markup(
        '<g class="aggregator"><title>{}</title>'
        '<rect x="{:.1f}" y="{:.1f}" width="30" height="30" rx="8" class="box"/>'
        '<use href="#shape-{}" class="state-{}" x="{:.1f}" y="{:.1f}" width="16" height="16"/>'
        '<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
        '<text class="small" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text></g>'
    ).format(
        title,
        x - 15,
        node.y - 15,
        node.state,
        node.state,
        x - 8,
        node.y - 8,
        x,
        node.y + 29,
        clean(node.label, 22),
        x,
        node.y + 43,
        traffic,
    )


def _learner(learner: Mapping[str, Any], shape: str, x: float, y: float) -> Markup:
    return Markup(
        "<g><title>{}, site {}: {}</title>"
        '<use href="#shape-{}" class="state-{}" x="{:.1f}" y="{:.1f}" width="16" height="16"/>'
        '<text class="name" x="{:.1f}" y="{:.1f}" dy="0.35em">{}</text></g>'
    ).format(
        clean(learner["id"], 80),
        clean(learner["site"], 80),
        learner["state"],
        shape,
        shape,
        x - 8,
        y - 8,
        x + 15,
        y,
        clean(learner["id"], 20),
    )
