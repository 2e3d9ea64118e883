"""One project: its pages, its stream, and what can be done with it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from flops.telemetry import readable
from flops.web import topology, words
from flops.web.call import RefusedError
from flops.web.curves import Series, chart
from flops.web.live import changes, stream, wake_on_events
from flops.web.page import Visit, checked_project, signed_in
from flops.web.picture import RESTING, Picture
from flops.web.told import Told, tell

TABS = ("overview", "learners", "events", "logs", "spec", "lineage")
_REGIONS: Mapping[str, tuple[str, ...]] = {
    "overview": ("head", "pipeline", "numbers", "curves", "topology", "rounds", "latest"),
    "learners": ("head", "topology", "learners"),
    "events": ("head", "events"),
    "logs": ("head", "logs"),
    "spec": ("head",),
    "lineage": ("head",),
}
_PAUSABLE = frozenset({"submitted", "preparing", "deploying", "training"})
_TAIL = 400
_MOST_ROUNDS, _MOST_ROUNDS_LIVE = 200, 40
_MOST_LOG_CHARACTERS = 200_000


def routes() -> list[Route]:
    return [
        Route("/projects/{project}", _page, methods=["GET"]),
        Route("/projects/{project}/stream", _stream, methods=["GET"]),
        Route("/projects/{project}/spec.json", _spec_file, methods=["GET"]),
        Route("/projects/{project}/{tab}", _page, methods=["GET"]),
        Route("/projects/{project}/{action}", _act, methods=["POST"]),
    ]


@dataclass
class View:
    """What the templates of a project show; costly parts are made when they are asked for."""

    project: Mapping[str, Any]
    picture: Picture
    logs: Mapping[str, str]
    service: str
    quiet: bool
    """Whether the list of events leaves out the small ones."""

    @cached_property
    def unit(self) -> str:
        mode = (self.project["spec"].get("training") or {}).get("mode")
        return "cycle" if mode == "hierarchical" else "round"

    @property
    def state(self) -> str:
        return str(self.project["state"])

    @property
    def resting(self) -> bool:
        return self.state in RESTING

    @property
    def can(self) -> Mapping[str, bool]:
        trains_on = self.state in ("finished", "paused") and bool(self.project["rounds_done"])
        return {
            "stop": not self.resting or self.state == "paused",
            "pause": self.state in _PAUSABLE,
            "resume": self.state == "paused",
            "extend": trains_on,
            "deploy": self.project["model"] is not None and self.state == "finished" and not self.served,
            "undeploy": self.served,
            "retry": self.state in ("failed", "stopped"),
            "delete": self.state in ("finished", "failed", "stopped"),
        }

    @property
    def served(self) -> bool:
        deployment = self.project["deployment"]
        return bool(deployment) and deployment.get("state") != "stopped"

    @property
    def connected(self) -> int:
        return sum(one["state"] == "connected" for one in self.project["learners"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        last = self.picture.last_round
        return (last.metrics if last else None) or self.project["metrics"] or {}

    @property
    def gain(self) -> float | None:
        """Of accuracy since the round before."""
        found = [done.metrics.get("accuracy") for done in self.picture.rounds[-2:]]
        known = [float(value) for value in found if isinstance(value, int | float)]
        return known[1] - known[0] if len(known) == 2 else None

    @cached_property
    def charts(self) -> list[tuple[str, Markup]]:
        """Titles and pictures of what developed over the rounds."""
        rounds = self.picture.rounds
        names = list(dict.fromkeys(name for done in rounds for name in done.metrics))
        names.sort(key=lambda name: {"loss": 0, "accuracy": 1}.get(name, 2))
        total = self.project["rounds_total"] if len(rounds) > 1 else None
        found: list[tuple[str, Markup]] = []
        for name in names[:6]:
            points = [
                (done.number, done.metrics[name]) for done in rounds if _is_number(done.metrics.get(name))
            ]
            if points:
                found.append(
                    (
                        name,
                        chart(
                            f"{words.clean(name, 40)} by {self.unit}",
                            [Series(words.clean(name, 40), points, len(found))],
                            unit=self.unit,
                            show=lambda value, name=name: words.metric(value, name),  # type: ignore[misc]
                            best=self.project["best_round"],
                            x_total=total,
                        ),
                    )
                )
        if len(rounds) > 1:
            points = [(done.number, done.duration_s) for done in rounds]
            found.append(
                (
                    f"time of a {self.unit}",
                    chart(
                        f"time of a {self.unit}",
                        [Series("time", points, 3)],
                        unit=self.unit,
                        show=words.duration,
                        low=0.0,
                        x_total=total,
                    ),
                )
            )
        return found

    @cached_property
    def topology(self) -> Markup:
        moved = {name: (one.bytes_down, one.bytes_up) for name, one in self.picture.members.items()}
        rounds = self.picture.rounds
        own = sum(done.bytes_down for done in rounds), sum(done.bytes_up for done in rounds)
        return topology.topology(
            self.project["learners"], self.project["clusters"], moved, total=own, state=self.state
        )

    @property
    def legend(self) -> list[tuple[str, int]]:
        return topology.counts(self.project["learners"])

    @property
    def rounds(self) -> list[Any]:
        """The newest first; few while they change all the time, because each change sends them."""
        most = _MOST_ROUNDS if self.resting else _MOST_ROUNDS_LIVE
        return self.picture.rounds[: -most - 1 : -1]

    def shape(self, state: str) -> str:
        return topology.shape_of(state)

    @cached_property
    def events(self) -> list[Told]:
        """The newest first."""
        found = [tell(event, self.unit) for event in reversed(self.picture.events)]
        return [one for one in found if one.tone != "quiet"] if self.quiet else found

    @cached_property
    def latest(self) -> list[Told]:
        found: list[Told] = []
        for event in reversed(self.picture.events):
            one = tell(event, self.unit)
            if one.tone != "quiet":
                found.append(one)
            if len(found) == 8:
                break
        return found

    @cached_property
    def spec_text(self) -> str:
        return yaml.safe_dump(_bare(self.project["spec"]), sort_keys=False, allow_unicode=True, width=100)

    @property
    def services(self) -> list[str]:
        return sorted(self.logs, key=_in_order)

    @property
    def log(self) -> str:
        text = self.logs.get(self.service, "")[-_MOST_LOG_CHARACTERS:]
        text = "\n".join(map(readable, text.splitlines()))
        return words.clean(text, _MOST_LOG_CHARACTERS)


async def _view(visit: Visit, tab: str) -> View:
    name = checked_project(visit.path["project"])
    found = await visit.api.get("projects", name)
    picture = await visit.house.pictures.of(visit.api, name)
    logs: Mapping[str, str] = {}
    service = visit.query.get("service", "")
    if tab == "logs":
        logs = (await visit.api.get("projects", name, "logs", tail=_TAIL))["logs"]
        if service not in logs:
            full = [key for key in sorted(logs) if logs[key].strip()]
            service = next((key for key in full if "aggregator" in key), full[0] if full else "")
    return View(found, picture, logs, service, visit.query.get("all") != "1")


async def _fragments(visit: Visit, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the project's learners were chosen by, as far as it is still held."""
    tags = (found["spec"].get("data") or {}).get("tags") or []
    if (found["spec"].get("data") or {}).get("mock"):
        tags = [f"mock-{found['id']}"]
    if not tags:
        return {"fragments": []}
    answer = await visit.api.find("data", "fragments", tag=tags)
    sites = {one["site"] for one in found["learners"]}
    kept = answer["fragments"] if answer else []
    return {"fragments": [one for one in kept if one["site"] in sites] if sites else kept}


@signed_in
async def _page(visit: Visit) -> Response:
    tab = visit.path.get("tab", "overview")
    if tab not in TABS:
        raise HTTPException(404)
    view = await _view(visit, tab)
    values: dict[str, Any] = {"view": view, "p": view.project, "tab": tab, "tabs": TABS}
    if tab == "lineage":
        look = _fragments(visit, view.project)
        return visit.page_in_two("project.html", "project_lineage.html", look, **values)
    return visit.page("project.html", **values)


@signed_in
async def _stream(visit: Visit) -> Response:
    tab = visit.query.get("tab", "overview")
    if tab not in TABS:
        raise HTTPException(404)
    first = await _view(visit, tab)
    woken = asyncio.Event()

    async def render() -> Mapping[str, str]:
        view = await _view(visit, tab)
        return {
            region: visit.render(f"project_{region}.html", view=view, p=view.project, tab=tab, tabs=TABS)
            for region in _REGIONS[tab]
        }

    async def listen() -> None:
        # Its stream ends when a project rests; a resting one is looked at now and then by `changes`.
        while True:
            view = await _view(visit, "overview")
            if not view.resting:
                await wake_on_events(visit.api, view.project["id"], view.picture.seq, woken)
                woken.set()
            await asyncio.sleep(1.0)

    async def messages() -> AsyncIterator[str]:
        listener = asyncio.create_task(listen())
        try:
            async for message in changes(render, woken, visit.house.closing):
                yield message
        finally:
            listener.cancel()
            with suppress(asyncio.CancelledError, RefusedError):
                await listener

    del first
    return stream(messages())


@signed_in
async def _spec_file(visit: Visit) -> Response:
    view = await _view(visit, "spec")
    return Response(
        json.dumps(view.project["spec"], indent=2),
        media_type="application/json",
        headers={"Content-Disposition": f'attachment; filename="{view.project["id"]}.json"'},
    )


@signed_in
async def _act(visit: Visit) -> Response:
    name, action = checked_project(visit.path["project"]), visit.path["action"]
    here = f"/projects/{name}"
    match action:
        case "stop":
            await visit.api.send("POST", "projects", name, "stop")
            return visit.go(here, "stopping")
        case "pause":
            await visit.api.send("POST", "projects", name, "pause")
            return visit.go(here, "pausing")
        case "resume":
            await visit.api.send("POST", "projects", name, "resume")
            return visit.go(here, "resumed")
        case "retry":
            await visit.api.send("POST", "projects", name, "retry")
            return visit.go(here, "resumed")
        case "extend":
            rounds = visit.form.one("rounds")
            if not rounds.isdecimal() or not rounds.isascii() or len(rounds) > 6:
                raise RefusedError(
                    422, "invalid-input", "rounds must be a whole number - how many more to train"
                )
            await visit.api.send("POST", "projects", name, "extend", body={"rounds": int(rounds)})
            return visit.go(here, "extended")
        case "deploy":
            onnx = "true" if visit.form.has("onnx") else "false"
            await visit.api.send("PUT", "projects", name, "deployment", params={"onnx": onnx})
            return visit.go(here, "deployed")
        case "undeploy":
            await visit.api.send("DELETE", "projects", name, "deployment")
            return visit.go(here, "undeployed")
        case "delete":
            await visit.api.send("DELETE", "projects", name)
            return visit.go("/", "deleted")
    raise HTTPException(404)


def _in_order(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    """Aggregators first, and numbers by what they count."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return "aggregator" not in name, [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bare(value: Any) -> Any:
    """A spec without what says nothing: empty values, lists and sections."""
    if isinstance(value, Mapping):
        inner = {key: _bare(part) for key, part in value.items()}
        return {key: part for key, part in inner.items() if part not in (None, [], {}, "")}
    return value
