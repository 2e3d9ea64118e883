"""Line charts as SVG that stretch with the page: positions are percentages, so text keeps its size.

Made on the server, styled by the stylesheet alone. Each chart has a title and a description for those who do
not see it, and its page a table with the same numbers. Points tell their values under the pointer by CSS.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_MOST_POINTS = 600
_MOST_MARKS = 80
_TICKS = 4
_PLAIN = re.compile(r"-?[0-9]+\.[0-9]+")
_DIVERGED = 1e100
"""Values beyond it are no values any more; NaN compares with nothing."""
_WHOLE_STEPS = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]


@dataclass(frozen=True)
class Series:
    """One line. ``number`` picks its colour and its dash, so that lines differ without colour too."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int = 0


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "round",
    show: Callable[[float], str],
    best: float | None = None,
    low: float | None = None,
    x_total: float | None = None,
) -> Markup:
    """A chart, or nothing where there are no points.

    Args:
        show: a value as text.
        best: the x of a point that is marked as the best.
        low: the smallest value of the axis; None: from the data.
        x_total: how far the x axis goes at least.
    """
    lines = [
        Series(line.name, [point for point in line.points if abs(point[1]) < _DIVERGED], line.number)
        for line in series
    ]
    every = [point for line in lines for point in line.points]
    if not every:
        return Markup("")
    least, most = min(x for x, _ in every), max(x for x, _ in every)
    most = max(most, x_total or most)
    ticks = nice_ticks(min(y for _, y in every) if low is None else low, max(y for _, y in every))
    bottom, top = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return 50.0 if most == least else 100 * (x - least) / (most - least)

    def down(y: float) -> float:
        return 100 - 100 * (y - bottom) / (top - bottom)

    parts = [
        _grid(ticks, down, show),
        _x_labels(least, most, across),
    ]
    for line in lines:
        parts.append(_line(line, across, down))
    if best is not None:
        parts += [_best(x, y, across, down) for x, y in lines[0].points if x == best][:1]
    if len(lines) == 1:
        parts.append(_marks(lines[0], across, down, show, unit))
    told = "; ".join(
        f"{line.name}: {show(line.points[0][1])} in {unit} {line.points[0][0]:g}, "
        f"{show(line.points[-1][1])} in {unit} {line.points[-1][0]:g}"
        for line in lines
        if line.points
    )
    return Markup(
        '<svg class="chart" role="img" aria-label="{}. {}"><title>{}</title><desc>{}</desc>{}</svg>'
    ).format(title, told, title, told, Markup("").join(parts))


def nice_ticks(least: float, most: float) -> list[float]:
    """Round values that enclose both, about five of them."""
    if most - least <= 1e-12 * max(abs(least), abs(most)) or most - least < 1e-290:
        pad = abs(most) * 0.02 if abs(most) > 1e-280 else 0.5
        least, most = least - pad, most + pad
    rough = max((most - least) / _TICKS, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _grid(ticks: list[float], down: Callable[[float], float], show: Callable[[float], str]) -> Markup:
    labels = _alike(ticks, [show(tick) for tick in ticks])
    return Markup("").join(
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0:.2f}%" y2="{0:.2f}%"/>'
            '<text class="tick" x="-8" y="{0:.2f}%" dy="0.32em" text-anchor="end">{1}</text>'
        ).format(down(tick), label)
        for tick, label in zip(ticks, labels, strict=True)
    )


def _alike(ticks: list[float], labels: list[str]) -> list[str]:
    """Plain numbers with as many decimals as they all need."""
    if not all(_PLAIN.fullmatch(label) for label in labels):
        return labels
    slack = 1e-6 * (ticks[1] - ticks[0])
    decimals = next((few for few in range(4) if all(abs(round(t, few) - t) < slack for t in ticks)), 4)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def _x_labels(least: float, most: float, across: Callable[[float], float]) -> Markup:
    step = next(size for size in _WHOLE_STEPS if size * 6 >= most - least)
    # The first and the last are always told; round ones that would touch them are not.
    first = (math.floor(least / step) + 1) * step
    between = [first + index * step for index in range(max(0, math.ceil((most - first) / step)))]
    between = [value for value in between if value - least > step * 0.55 and most - value > step * 0.55]
    values = list(dict.fromkeys([least, *between, most]))
    return Markup("").join(
        Markup('<text class="tick" x="{:.2f}%" y="100%" dy="1.5em" text-anchor="{}">{:g}</text>').format(
            across(value), "start" if across(value) < 1 and len(values) > 1 else "middle", value
        )
        for value in values
    )


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    if len(points) <= most:
        return list(points)
    stride = math.ceil(len(points) / most)
    return [*points[:-1:stride], points[-1]]


def _line(line: Series, across: Callable[[float], float], down: Callable[[float], float]) -> Markup:
    points = _thinned(line.points, _MOST_POINTS)
    if not points:
        return Markup("")
    path = " ".join(f"{across(x) * 10:.1f},{down(y) * 10:.1f}" for x, y in points)
    drawn = Markup(
        '<svg class="plot" viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">'
        '<polyline class="line s{}" points="{}" vector-effect="non-scaling-stroke"/></svg>'
    ).format(line.number, path)
    x, y = points[-1]
    return drawn + Markup('<circle class="end s{}" cx="{:.2f}%" cy="{:.2f}%" r="3.5"/>').format(
        line.number, across(x), down(y)
    )


def _best(x: float, y: float, across: Callable[[float], float], down: Callable[[float], float]) -> Markup:
    return Markup(
        '<circle class="best" cx="{0:.2f}%" cy="{1:.2f}%" r="6.5"/>'
        '<text class="best-word" x="{0:.2f}%" y="{1:.2f}%" dy="{2}" text-anchor="{3}">best</text>'
    ).format(
        across(x),
        down(y),
        "-0.9em" if down(y) > 15 else "1.7em",
        "end" if across(x) > 95 else "start" if across(x) < 5 else "middle",
    )


def _marks(
    line: Series,
    across: Callable[[float], float],
    down: Callable[[float], float],
    show: Callable[[float], str],
    unit: str,
) -> Markup:
    points = _thinned(line.points, _MOST_MARKS)
    width = 100 / max(1, len(points))
    found = []
    for x, y in points:
        at = across(x)
        found.append(
            Markup(
                '<g class="mark"><rect x="{:.2f}%" y="0" width="{:.2f}%" height="100%"/>'
                '<line x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="100%"/><circle cx="{:.2f}%" cy="{:.2f}%" r="4"/>'
                '<text x="{:.2f}%" y="-6" text-anchor="{}">{} {:g}: {}</text></g>'
            ).format(
                at - width / 2,
                width,
                at,
                at,
                at,
                down(y),
                at,
                "start" if at < 20 else "end" if at > 80 else "middle",
                unit,
                x,
                escape(show(y)),
            )
        )
    return Markup("").join(found)
