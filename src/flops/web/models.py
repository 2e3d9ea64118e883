"""Registered models: all, one with its versions, its card; the files of a version."""

import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flops.web import words
from flops.web.call import Api, RefusedError
from flops.web.curves import Series, chart
from flops.web.page import Visit, signed_in

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


def routes() -> list[Route]:
    return [
        Route("/models", _list, methods=["GET"]),
        Route("/models/{name}", _page, methods=["GET"]),
        Route("/models/{name}/{version:int}/archive", _archive, methods=["GET"]),
        Route("/models/{name}/{version:int}/card.md", _card_file, methods=["GET"]),
    ]


@signed_in
async def _list(visit: Visit) -> Response:
    versions = (await visit.api.get("models"))["models"]
    models: dict[str, list[Any]] = {}
    for one in versions:
        models.setdefault(one["name"], []).append(one)
    return visit.page("models.html", models=models)


@signed_in
async def _page(visit: Visit) -> Response:
    name = visit.path["name"]
    versions = await _versions(visit, name)
    wanted = visit.query.get("version", "")
    picked = next((one for one in versions if str(one["version"]) == wanted), versions[0])
    project = await visit.api.find("projects", str(picked["project"]))
    names = list(dict.fromkeys(key for one in versions for key in one["metrics"]))
    charts = []
    for index, metric in enumerate(sorted(names, key=lambda one: {"loss": 0, "accuracy": 1}.get(one, 2))[:4]):
        points = [
            (float(one["version"]), float(one["metrics"][metric]))
            for one in reversed(versions)
            if isinstance(one["metrics"].get(metric), int | float)
        ]
        if len(points) > 1:

            def show(value: float, metric: str = metric) -> str:
                return words.metric(value, metric)

            title = f"{words.clean(metric, 40)} by version"
            charts.append((metric, chart(title, [Series(metric, points, index)], unit="version", show=show)))
    return visit.page(
        "model.html",
        name=name,
        versions=versions,
        picked=picked,
        project=project,
        charts=charts,
        served=_served(project, picked),
    )


class _Download(Response):
    """A stream of the API, passed on as it is made."""

    def __init__(self, api: Api, *parts: str, file_name: str) -> None:
        super().__init__()
        self._api, self._parts = api, parts
        self._disposition = f'attachment; filename="{_UNSAFE.sub("-", file_name)}"'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._api.open("GET", *self._parts) as answer:
            passed = StreamingResponse(
                answer.body,
                media_type=answer.headers.get("content-type"),
                headers={"Content-Disposition": self._disposition},
            )
            await passed(scope, receive, send)


@signed_in
async def _archive(visit: Visit) -> Response:
    name, version = visit.path["name"], visit.path["version"]
    return _Download(
        visit.api, "models", name, "versions", version, "archive", file_name=f"{name}-{version}.tar"
    )


@signed_in
async def _card_file(visit: Visit) -> Response:
    name = visit.path["name"]
    versions = await _versions(visit, name)
    picked = next((one for one in versions if str(one["version"]) == visit.path["version"]), None)
    if picked is None:
        raise HTTPException(404)
    project = await visit.api.find("projects", str(picked["project"]))
    return PlainTextResponse(
        _card(picked, project),
        media_type="text/markdown",
        headers={"Content-Disposition": 'attachment; filename="model-card.md"'},
    )


async def _versions(visit: Visit, name: str) -> list[Any]:
    found = (await visit.api.get("models", name))["versions"]
    if not found:
        raise RefusedError(404, "not-found", f"there is no model '{words.clean(name, 60)}' - see the models")
    return list(found)


def _served(project: Mapping[str, Any] | None, picked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    deployment = project["deployment"] if project else None
    return deployment if deployment and deployment["version"] == picked["version"] else None


def _card(version: Mapping[str, Any], project: Mapping[str, Any] | None) -> str:
    """The model card as Markdown; what is not known is said to be so."""
    lines = [
        f"# {words.clean(version['name'], 80)} {version['version']}",
        "",
        f"Registered {words.absolute(version['created'])} from project {version['project']}.",
        "",
        "## Metrics",
        "",
        *(
            f"- {words.clean(key, 60)}: {words.metric(value, key)}"
            for key, value in version["metrics"].items()
        ),
        "",
        "Measured by the learners on their own test data, weighted by examples.",
    ]
    if project is None:
        return "\n".join([*lines, "", "The project that made it is not here any more."]) + "\n"
    training = project["spec"]["training"]
    tags = ", ".join(map(words.clean, project["spec"]["data"].get("tags") or []))
    return "\n".join(
        [
            *lines,
            "",
            "## Lineage",
            "",
            f"- code: {words.clean(project['source'])} at {project['commit'] or 'an unknown commit'}",
            f"- environment: lock {project['lock'] or 'unknown'}",
            f"- data: tags {tags or 'none'}",
            f"- learners: {len(project['learners'])}, clusters: {len(project['clusters'])}",
            f"- strategy: {words.clean(training['strategy']['name'])}, seed {training['seed']}",
            f"- rounds: {project['rounds_done']}, the best is {project['best_round'] or 'not known'}",
            "",
        ]
    )
