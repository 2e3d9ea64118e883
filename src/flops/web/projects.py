"""The list of projects."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flops.web.live import changes, stream
from flops.web.page import Visit, signed_in
from flops.web.picture import RESTING

_MOST_SHOWN, _MOST_ASKED = 200, 1000
_LOOK_S = 0.8


def routes() -> list[Route]:
    return [
        Route("/", _list, methods=["GET"]),
        Route("/projects", _list, methods=["GET"]),
        Route("/stream", _stream, methods=["GET"]),
    ]


@signed_in
async def _list(visit: Visit) -> Response:
    if visit.request.url.path == "/" and not visit.may("projects:read"):
        return visit.go("/data")
    found = await _look(visit)
    return visit.page("projects.html", **found)


@signed_in
async def _stream(visit: Visit) -> Response:
    async def render() -> Mapping[str, str]:
        return {"projects": visit.render("projects_list.html", **await _look(visit))}

    return stream(changes(render, asyncio.Event(), visit.house.closing, _LOOK_S))


async def _look(visit: Visit) -> dict[str, Any]:
    projects = (await visit.api.get("projects", limit=_MOST_ASKED))["projects"]
    states = [one["state"] for one in projects]
    wanted = visit.query.get("state", "")
    if wanted == "active":
        projects = [one for one in projects if one["state"] not in RESTING]
    elif wanted:
        projects = [one for one in projects if one["state"] == wanted]
    return {
        "projects": projects[:_MOST_SHOWN],
        "not_shown": max(0, len(projects) - _MOST_SHOWN),
        "total": len(states),
        "active": sum(state not in RESTING for state in states),
        "failed": states.count("failed"),
        "finished": states.count("finished"),
        "wanted": wanted,
    }
