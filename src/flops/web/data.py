"""Data tags and fragments, known data sets to try things out with, and the nodes that hold and run things."""

import asyncio
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from flops.web.call import RefusedError
from flops.web.page import Visit, signed_in

_MOST_SHOWN, _MOST_USES = 500, 200
_MOCKED = "mock-"


def routes() -> list[Route]:
    return [
        Route("/data", _page, methods=["GET"]),
        Route("/data/mock", _mock, methods=["POST"]),
        Route("/data/fragments/{fragment}/delete", _drop, methods=["POST"]),
        Route("/nodes", _nodes, methods=["GET"]),
    ]


@signed_in
async def _page(visit: Visit) -> Response:
    return visit.page_in_two("data.html", "data_held.html", _held(visit))


async def _held(visit: Visit) -> dict[str, Any]:
    wanted = visit.query.get("tag", "")
    tags, found, uses = await asyncio.gather(
        visit.api.get("data", "tags"),
        visit.api.get("data", "fragments", tag=[wanted] if wanted else None),
        visit.api.find("data", "uses", tag=wanted or None, limit=_MOST_USES),
    )
    fragments = sorted(found["fragments"], key=lambda one: (one["site"], -one["created"]))
    if not wanted:  # what projects mocked for themselves is shown under its own tag
        fragments = [one for one in fragments if not all(tag.startswith(_MOCKED) for tag in one["tags"])]
    return {
        "tags": [one for one in tags["tags"] if not one["tag"].startswith(_MOCKED)],
        "mocked": [one for one in tags["tags"] if one["tag"].startswith(_MOCKED)],
        "wanted": wanted,
        "fragments": fragments[:_MOST_SHOWN],
        "uses": [
            one
            for one in (uses["uses"] if uses else [])
            if wanted or not one["tags"] or not all(tag.startswith(_MOCKED) for tag in one["tags"])
        ],
        "not_shown": max(0, len(fragments) - _MOST_SHOWN),
    }


@signed_in
async def _mock(visit: Visit) -> Response:
    sites = visit.form.one("sites")
    if not (sites.isascii() and sites.isdecimal() and len(sites) <= 5):
        raise RefusedError(422, "invalid-input", "sites must be a whole number - how many there are to be")
    tag = visit.form.one("tag")
    body = {
        "dataset": visit.form.one("dataset"),
        "tags": [tag],
        "sites": int(sites),
        "partition": visit.form.one("partition"),
    }
    await visit.api.send("POST", "data", "mock", body=body)
    return visit.go("/data", "mocked")


@signed_in
async def _drop(visit: Visit) -> Response:
    await visit.api.send("DELETE", "data", "fragments", visit.path["fragment"])
    return visit.go("/data", "dropped")


@signed_in
async def _nodes(visit: Visit) -> Response:
    return visit.page_in_two("nodes.html", "nodes_list.html", _look(visit))


async def _look(visit: Visit) -> dict[str, Any]:
    problem = ""
    nodes: list[Any] = []
    try:
        found = await visit.api.find("nodes")
        nodes = found["nodes"] if found else []
    except RefusedError as error:
        if error.status != 503:
            raise
        problem = error.detail
    held: dict[str, dict[str, Any]] = {}
    fragments = await visit.api.find("data", "fragments")
    for one in fragments["fragments"] if fragments else []:
        node = held.setdefault(one["node"], {"sites": set(), "fragments": 0, "size_bytes": 0})
        node["sites"].add(one["site"])
        node["fragments"] += 1
        node["size_bytes"] += one["size_bytes"]
    if len(nodes) == 1 and "" in held:  # one machine: data that name no node are there
        held.setdefault(nodes[0]["name"], held[""])
    return {"nodes": nodes, "held": held, "problem": problem}
