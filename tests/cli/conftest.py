"""A stand-in for the manager that really speaks HTTP: the REST contract over what a test puts into it."""

import asyncio
import io
import json
import os
import socket
import sys
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from flops.cli.main import main
from flops.core.settings import Settings

TOKEN = "the-token"
PROJECT = "p-7k2mqd"


class StandIn:
    """One FLOPS_HOME's manager. State outlives `kill`, as the real one's does on disk."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home)
        self.projects: dict[str, dict[str, Any]] = {}
        self.happened: dict[str, list[dict[str, Any]]] = {}
        self.script: list[tuple[str, dict[str, Any]]] = []
        """What happens to the next project at once when it is submitted."""
        self.requests: list[tuple[str, str, Any]] = []
        self.stream_starts: list[int] = []
        self.fragments: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []
        self.archive = b""
        self.gui_url = "http://127.0.0.1:5000"
        self.shut_down = threading.Event()
        self.streaming = threading.Event()
        """Set while somebody reads an event stream."""
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    # the test's side

    def up(self) -> None:
        """Serve on a fresh port, and say so in the address file."""
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self._app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=0, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        self.settings.home.mkdir(parents=True, exist_ok=True)
        self.settings.token_file.write_text(TOKEN)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.settings.address_file.write_text(json.dumps({"url": url, "pid": os.getpid()}))

    def kill(self) -> None:
        """End without a word: streams break, the address file stays."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = self._server.force_exit = True
        self._wake()
        self._thread.join(timeout=10)
        self._server = None

    def emit(self, kind: str, project: str = PROJECT, **data: Any) -> None:
        """Let something happen to a project."""
        events = self.happened[project]
        events.append(
            {
                "project": project,
                "seq": len(events) + 1,
                "time": 1_700_000_000.0 + len(events),
                "kind": kind,
                "data": data,
            }
        )
        if kind == "project.state":
            self.projects[project] |= data
        self._wake()

    def add_project(self, project: str = PROJECT, **values: Any) -> None:
        self.projects[project] = {
            "id": project,
            "name": "mnist",
            "state": "submitted",
            "reason": None,
            "created": time.time(),
            "updated": time.time(),
            "finished": None,
            "spec": {},
            "source": "https://***@host/mnist",
            "commit": None,
            "lock": None,
            "contract": None,
            "rounds_done": 0,
            "rounds_total": 2,
            "learners": [],
            "metrics": None,
            "best_round": None,
            "model": None,
            "services": [],
            "experiment_url": None,
        } | values
        self.happened[project] = []

    def _wake(self) -> None:
        for loop, event in list(self._waiting):
            loop.call_soon_threadsafe(event.set)

    # the manager's side

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def guard(request: Request, proceed: Callable[[Request], Any]) -> Response:
            if request.url.path == "/v1/health":
                return JSONResponse({"status": "ok", "version": "9.9", "pid": os.getpid()})
            if request.headers.get("authorization") != f"Bearer {TOKEN}":
                return problem(401, "unauthorized", "bring the token")
            answer: Response = await proceed(request)
            return answer

        @app.post("/v1/projects", status_code=201)
        async def submit(request: Request) -> Any:
            spec = (await request.json())["spec"]
            self.requests.append(("POST", "/v1/projects", spec))
            if spec["name"] == "taken":
                return problem(409, "conflict", "project 'taken' runs already - stop it first")
            if spec["name"] == "broken":
                return Response("<html>oops</html>", 500)
            self.add_project(spec=spec, rounds_total=spec["training"]["rounds"])
            for kind, data in self.script:
                self.emit(kind, **data)
            return self.projects[PROJECT]

        @app.get("/v1/projects")
        def projects(request: Request) -> Any:
            self.requests.append(("GET", "/v1/projects", str(request.query_params)))
            newest = sorted(self.projects.values(), key=lambda project: -project["created"])
            return {"projects": newest, "next": None}

        @app.get("/v1/projects/{project}")
        def show(project: str) -> Any:
            return self.projects.get(project) or missing(project)

        @app.post("/v1/projects/{project}/stop")
        def stop(project: str) -> Any:
            if project not in self.projects:
                return missing(project)
            self.emit("project.state", project, state="stopped", reason="a user asked for it")
            return self.projects[project]

        @app.post("/v1/projects/{project}/pause")
        def pause(project: str) -> Any:
            if self.projects[project]["state"] == "finished":
                return problem(409, "conflict", f"project {project} is finished - it cannot be paused")
            self.emit("project.state", project, state="paused", reason="a user asked for it")
            return self.projects[project]

        @app.post("/v1/projects/{project}/extend")
        async def extend(project: str, request: Request) -> Any:
            self.requests.append(("POST", "extend", await request.json()))
            self.emit("project.state", project, state="deploying", reason="extended by 3 rounds")
            return self.projects[project]

        @app.post("/v1/projects/{project}/resume")
        def resume(project: str) -> Any:
            self.emit("project.state", project, state="deploying", reason="resume was requested")
            return self.projects[project]

        @app.post("/v1/projects/{project}/retry")
        def retry(project: str) -> Any:
            self.emit("project.state", project, state="preparing", reason="another attempt was requested")
            return self.projects[project]

        @app.delete("/v1/projects/{project}", status_code=204, response_model=None)
        def remove(project: str, force: bool = False) -> Any:
            if self.projects[project]["state"] == "training" and not force:
                return problem(409, "conflict", f"project {project} is training - stop it first")
            del self.projects[project]
            return Response(status_code=204)

        @app.get("/v1/projects/{project}/events")
        def events(project: str, request: Request, after: int = 0, follow: bool = False) -> Any:
            if project not in self.projects:
                return missing(project)
            if not follow:
                return {"events": self.happened[project][after:]}
            after = int(request.headers.get("last-event-id") or after)
            self.stream_starts.append(after)
            return StreamingResponse(self._stream(project, after), media_type="text/event-stream")

        @app.get("/v1/projects/{project}/logs")
        def logs(project: str, service: str | None = None, tail: int | None = None) -> Any:
            texts = {f"{project}-aggregator": "one\ntwo\n", f"{project}-learner-1": "\x1b[31mred\x07\n"}
            return {
                "logs": {
                    name: "".join(text.splitlines(keepends=True)[-(tail or 99) :])
                    for name, text in texts.items()
                    if service in (None, name)
                }
            }

        @app.post("/v1/data/fragments", status_code=201)
        async def put(request: Request) -> Any:
            body = await request.body()
            query = request.query_params
            self.requests.append(("POST", "/v1/data/fragments", body))
            self.fragments.append(fragment(query.getlist("tag"), query["site"], len(body)))
            return self.fragments[-1]

        @app.get("/v1/data/fragments")
        def fragments(request: Request) -> Any:
            tags = set(request.query_params.getlist("tag"))
            return {"fragments": [one for one in self.fragments if not tags or tags & set(one["tags"])]}

        @app.delete("/v1/data/fragments/{name}", status_code=204, response_model=None)
        def drop(name: str) -> Any:
            if name != "f-1":
                return problem(404, "not-found", f"there is no fragment {name}")
            return Response(status_code=204)

        @app.post("/v1/data/mock")
        async def mock(request: Request) -> Any:
            self.requests.append(("POST", "/v1/data/mock", await request.json()))
            return {"fragments": [fragment(["mnist"], "site-1", 12_345)]}

        @app.get("/v1/models")
        def models() -> Any:
            return {"models": self.models, "next": None}

        @app.get("/v1/models/{name}/versions/{version}/archive")
        def archive(name: str, version: int) -> Any:
            self.requests.append(("GET", "archive", (name, version)))
            return Response(self.archive, media_type="application/x-tar")

        @app.post("/v1/ui")
        def ui() -> Any:
            return {"url": self.gui_url}

        @app.post("/v1/shutdown", status_code=202)
        async def shutdown(request: Request) -> Any:
            self.requests.append(("POST", "/v1/shutdown", await request.json()))
            self.settings.address_file.unlink()
            assert self._server is not None
            self._server.should_exit = True
            return {"status": "stopping"}

        return app

    async def _stream(self, project: str, after: int) -> AsyncIterator[str]:
        changed = asyncio.Event()
        entry = (asyncio.get_running_loop(), changed)
        self._waiting.add(entry)
        self.streaming.set()
        try:
            yield ": heartbeat\n\n"
            while self._server is not None and not self._server.should_exit:
                changed.clear()
                for event in self.happened[project][after:]:
                    after = event["seq"]
                    yield f"id: {after}\nevent: {event['kind']}\ndata: {json.dumps(event)}\n\n"
                if self.projects[project]["state"] in ("finished", "failed", "stopped", "paused"):
                    return
                await changed.wait()
        finally:
            self._waiting.discard(entry)
            self.streaming.clear()


def problem(status: int, code: str, detail: str) -> Response:
    body = {"type": "about:blank", "title": code, "status": status, "detail": detail, "code": code}
    return JSONResponse(body, status, media_type="application/problem+json")


def missing(project: str) -> Response:
    return problem(404, "not-found", f"there is no project {project} - see 'flops ls'")


def fragment(tags: list[str], site: str, size: int) -> dict[str, Any]:
    return {
        "id": "f-1",
        "site": site,
        "tags": tags,
        "num_examples": 20_000,
        "size_bytes": size,
        "columns": {"image": "struct", "label": "int64"},
        "allow_metrics": False,
        "created": 1_700_000_000.0,
    }


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running stand-in whose FLOPS_HOME is this process's."""
    manager = StandIn(tmp_path / "home")
    monkeypatch.setenv("FLOPS_HOME", str(tmp_path / "home"))
    manager.up()
    yield manager
    manager.kill()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Flops = Callable[..., Outcome]


@pytest.fixture
def flops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Flops:
    """Runs `flops ARGUMENTS` in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["flops", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def finished_script() -> list[tuple[str, dict[str, Any]]]:
    """All that happens to a project of two rounds that goes well, more or less."""
    return [
        ("project.state", {"state": "preparing", "reason": None}),
        ("step.started", {"step": "fetch"}),
        ("step.progress", {"step": "fetch", "message": "commit 1a2b3c"}),
        ("step.finished", {"step": "fetch", "duration_s": 0.4}),
        ("warning", {"message": "python 3.10.14 is not here, 3.10.16 is used"}),
        ("step.started", {"step": "environment"}),
        ("step.finished", {"step": "environment", "duration_s": 14.2}),
        ("project.state", {"state": "deploying", "reason": None}),
        ("project.state", {"state": "training", "reason": None}),
        ("training.waiting", {"round": 1, "connected": 1, "needed": 3, "deadline_s": 120.0}),
        ("learner.connected", {"learner": "learner-1"}),
        ("round.started", {"round": 1, "cohort": ["learner-1", "learner-2", "learner-3"]}),
        ("update.received", {"round": 1, "learner": "learner-1", "bytes": 100, "fit_s": 0.1}),
        ("update.refused", {"round": 1, "learner": "learner-3", "reason": "coef is not finite\x1b[2J"}),
        (
            "round.finished",
            {
                "round": 1,
                "participants": 2,
                "cohort": 3,
                "left_out": {"learner-3": "coef is not finite"},
                "metrics": {"loss": 0.4012, "accuracy": 0.881},
                "duration_s": 1.25,
                "bytes_down": 94_200,
                "bytes_up": 62_800,
            },
        ),
        ("learner.left", {"learner": "learner-3", "reason": "fit_model: ValueError"}),
        ("round.started", {"round": 2, "cohort": ["learner-1", "learner-2"]}),
        (
            "round.finished",
            {
                "round": 2,
                "participants": 2,
                "cohort": 3,
                "left_out": {"learner-2": "too slow"},
                "metrics": {"loss": 0.3101, "accuracy": 0.892},
                "duration_s": 0.012,
            },
        ),
        ("training.finished", {"rounds": 2, "best_round": 2, "metrics": {"loss": 0.3101, "accuracy": 0.892}}),
        ("learner.left", {"learner": "learner-1", "reason": "training is over"}),
        ("project.state", {"state": "packaging", "reason": None}),
        ("model.registered", {"name": "mnist", "version": 3, "round": 2, "uri": "models:/mnist/3"}),
        ("a.kind.of.tomorrow", {"x": 1}),
        ("project.state", {"state": "finished", "reason": None}),
    ]


@pytest.fixture
def tar_of() -> Callable[[dict[str, bytes | tarfile.TarInfo]], bytes]:
    """Makes a tar archive of names and contents, or of whole headers."""

    def make(entries: dict[str, bytes | tarfile.TarInfo]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in entries.items():
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    return make
