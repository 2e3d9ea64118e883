"""Some projects beside each other: curves in one picture, results, and where their specs differ."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flops.web import words
from flops.web.curves import Series, chart
from flops.web.page import Visit, checked_project, signed_in
from flops.web.picture import Picture

_MOST = 6
_MOST_OFFERED = 50


def routes() -> list[Route]:
    return [Route("/compare", _page, methods=["GET"])]


@signed_in
async def _page(visit: Visit) -> Response:
    asked = list(dict.fromkeys(visit.request.query_params.getlist("id")))
    if not asked:
        offered = (await visit.api.get("projects", limit=_MOST_OFFERED))["projects"]
        offered = [one for one in offered if one["rounds_done"]]
        return visit.page("compare.html", offered=offered, shown=[], asked=[], most=_MOST)
    for name in asked:
        checked_project(name)
    shown = await asyncio.gather(*(_one(visit, name) for name in asked[:_MOST]))
    return visit.page(
        "compare.html",
        offered=[],
        shown=[project for project, _ in shown],
        asked=asked,
        most=_MOST,
        charts=_charts(shown),
        rows=_differences([project["spec"] for project, _ in shown]),
        took=[picture.took_s for _, picture in shown],
        moved=[picture.bytes_down + picture.bytes_up for _, picture in shown],
    )


async def _one(visit: Visit, name: str) -> tuple[Mapping[str, Any], Picture]:
    return await visit.api.get("projects", name), await visit.house.pictures.of(visit.api, name)


def _charts(shown: list[tuple[Mapping[str, Any], Picture]]) -> list[tuple[str, Any]]:
    found = []
    for metric in ("loss", "accuracy"):
        series = []
        for index, (project, picture) in enumerate(shown):
            points = [
                (float(done.number), float(done.metrics[metric]))
                for done in picture.rounds
                if isinstance(done.metrics.get(metric), int | float)
            ]
            if points:
                label = f"{words.clean(project['name'], 40)} {project['id']}"
                series.append(Series(label, points, index))

        def show(value: float, metric: str = metric) -> str:
            return words.metric(value, metric)

        if series:
            found.append((metric, chart(f"{metric} by round", series, show=show)))
    return found


def _differences(specs: list[Mapping[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Values by dotted name, and whether they differ; those that differ come first."""
    flat = [words.flat(spec) for spec in specs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = []
    for name in names:
        values = [words.plain(one.get(name)) for one in flat]
        differs = len(set(values)) > 1
        if differs or any(value != words.NOTHING for value in values):
            rows.append((words.clean(name, 80), values, differs))
    return sorted(rows, key=lambda row: not row[2])
