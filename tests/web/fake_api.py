"""A stand-in of the REST API: answers from plain values, and remembers what it was asked."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope, Send

Answer = tuple[int, Any]


@dataclass
class FakeApi:
    """``answers`` by "METHOD /path": (status, JSON value), bytes, or an iterator of bytes."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, str, Any, str]] = field(default_factory=list)
    """Method, path, body and token."""
    token: str = "good-token"

    def problem(self, key: str, status: int, detail: str) -> None:
        self.answers[key] = (status, {"detail": detail, "code": "x", "status": status})

    def changes(self) -> list[tuple[str, str, Any]]:
        return [(method, path, body) for method, path, body, _ in self.asked if method != "GET"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = (await receive()).get("body", b"")
        headers = dict(scope["headers"])
        token = headers.get(b"authorization", b"").decode().removeprefix("Bearer ")
        body = json.loads(content) if content else None
        self.asked.append((scope["method"], scope["path"], body, token))
        key = f"{scope['method']} {scope['path']}"
        status, value = 404, {"detail": f"{key} is not there", "code": "not-found"}
        if token != self.token:
            status, value = 401, {"detail": "the token is wrong", "code": "unauthorized"}
        elif key in self.answers:
            found = self.answers[key]
            found = found(scope) if callable(found) else found
            status, value = found if isinstance(found, tuple) else (200, found)
        await send({"type": "http.response.start", "status": status, "headers": []})
        for piece in _pieces(value):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif hasattr(value, "__next__"):
        yield from value
    elif value is not None:
        yield json.dumps(value).encode()


ALL = [
    f"{area}:{right}"
    for area in ("projects", "models", "data", "nodes", "users", "tokens", "audit")
    for right in ("read", "write")
]
HOSTILE = "<script>alert('x')</script>\x1b[31m\u202e\"' onload=x"


def project(name: str = "p-7k2mqd", words: str = "scans", **values: Any) -> dict[str, Any]:
    """A project in the middle of its training; every text in it is ``words``."""
    learners = [
        {"id": f"{words}-1", "site": words, "cluster": None, "state": "connected", "reason": None},
        {"id": f"{words}-2", "site": words, "cluster": None, "state": "ejected", "reason": words},
    ]
    found = {
        "id": name,
        "name": words,
        "owner": words,
        "team": None,
        "state": "training",
        "reason": None,
        "created": 1000.0,
        "updated": 1000.0,
        "finished": None,
        "spec": {
            "repo": words,
            "ref": words,
            "model": {"initial": None},
            "training": {"mode": "classic", "rounds": 5, "strategy": {"name": words}, "seed": 0},
            "data": {"tags": [words]},
            "selection": {"metric": "loss"},
        },
        "source": words,
        "commit": "ab" * 20,
        "lock": "cd" * 16,
        "contract": words,
        "rounds_done": 2,
        "rounds_total": 5,
        "learners": learners,
        "clusters": [],
        "metrics": {"loss": 0.5, "accuracy": 0.75},
        "best_round": 2,
        "model": None,
        "deployment": None,
        "services": [],
        "experiment_url": None,
    }
    return found | values


def events(words: str = "scans") -> list[dict[str, Any]]:
    told: list[tuple[str, dict[str, Any]]] = [
        ("project.state", {"state": "submitted", "reason": None}),
        ("project.state", {"state": "preparing", "reason": words}),
        ("step.started", {"step": words}),
        ("step.progress", {"step": words, "message": words}),
        ("step.finished", {"step": words, "duration_s": 1.5}),
        ("warning", {"message": words}),
        ("project.state", {"state": "training", "reason": None}),
        ("learner.connected", {"learner": f"{words}-1"}),
        ("round.started", {"round": 1, "cohort": 2}),
        ("update.refused", {"round": 1, "learner": f"{words}-2", "reason": words}),
        ("learner.ejected", {"learner": f"{words}-2", "reason": words}),
        finished(1, 0.7, words),
        finished(2, 0.5, words),
        ("of-the-future", {words: words}),
    ]
    return [
        {"project": "p-7k2mqd", "seq": seq, "time": 1000.0 + seq, "kind": kind, "data": data}
        for seq, (kind, data) in enumerate(told, start=1)
    ]


def finished(number: int, loss: float, words: str = "scans") -> tuple[str, dict[str, Any]]:
    return "round.finished", {
        "round": number,
        "participants": 1,
        "cohort": 2,
        "left_out": {f"{words}-2": words},
        "fit_s": {f"{words}-1": 0.2},
        "bytes_down": 2000,
        "bytes_up": 1000,
        "metrics": {"loss": loss, "accuracy": 1 - loss, words: loss},
        "duration_s": 0.4,
    }


def full(words: str = "scans") -> FakeApi:
    """An API that has something of everything."""
    model = {
        "name": words,
        "version": 1,
        "project": "p-7k2mqd",
        "round": 2,
        "metrics": {"loss": 0.5, words: 0.75},
        "created": 1000.0,
        "uri": words,
    }
    fragment = {
        "id": "f-1",
        "site": words,
        "tags": [words],
        "num_examples": 10,
        "size_bytes": 1000,
        "columns": {words: words},
        "allow_metrics": False,
        "created": 1000.0,
        "content_hash": "ef" * 32,
        "labels": {words: words},
        "node": words,
        "owner": None,
    }
    tag = {"tag": words, "sites": [words], "fragments": 1, "num_examples": 10, "size_bytes": 1000}
    use = {
        "site": words,
        "learner": words,
        "project": words,
        "name": words,
        "owner": words,
        "state": words,
        "source": words,
        "commit": words,
        "image": None,
        "tags": [words],
        "created": 1000.0,
        "updates": 2,
        "bytes_out": 1000,
    }
    node = {
        "name": words,
        "platform": words,
        "cpus": 2,
        "memory_mb": 1000,
        "labels": {words: words},
        "address": words,
        "ready": True,
        "kind": "orchestrator",
        "owner": None,
        "joined": None,
        "last_seen": None,
        "tags": [],
        "policy": None,
        "version": None,
    }
    joined = node | {
        "ready": False,
        "kind": "joined",
        "owner": words,
        "joined": 1000.0,
        "last_seen": 1000.0,
        "tags": [words] * 9,
        "policy": {"tags": [words], "owners": [words] * 5, "teams": [], "repositories": []},
        "version": words,
    }
    entry = {
        "seq": 1,
        "time": 1000.0,
        "user": words,
        "token": words,
        "address": words,
        "action": words,
        "object": words,
        "outcome": 201,
        "detail": {},
        "hash": words,
    }
    token = {
        "id": words,
        "user": words,
        "name": words,
        "scopes": [words],
        "created": 1000.0,
        "expires": None,
        "last_used": None,
        "revoked": None,
    }
    user = {"name": words, "role": words, "teams": [words], "disabled": False, "created": 1000.0}
    told = events(words)
    after: Callable[[Scope], Any] = lambda scope: {  # noqa: E731
        "events": [one for one in told if one["seq"] > _after(scope)]
    }
    return FakeApi(
        {
            "GET /v1/me": {"user": words, "role": "admin", "teams": [words], "scopes": [words, *ALL]},
            "GET /v1/projects": {"projects": [project(words=words)], "next": None},
            "GET /v1/projects/p-7k2mqd": project(words=words),
            "GET /v1/projects/p-7k2mqd/events": after,
            "GET /v1/projects/p-7k2mqd/logs": {"logs": {words: words}},
            "GET /v1/models": {"models": [model]},
            f"GET /v1/models/{words}": {"name": words, "versions": [model]},
            "GET /v1/data/tags": {"tags": [tag]},
            "GET /v1/data/fragments": {"fragments": [fragment]},
            "GET /v1/data/uses": {"uses": [use]},
            "GET /v1/nodes": {"nodes": [node, joined]},
            "GET /v1/users": {"users": [user]},
            "GET /v1/tokens": {"tokens": [token]},
            "GET /v1/audit": {"entries": [entry]},
            "GET /v1/specs/strategies": {"strategies": ["FedAvg", words]},
            "POST /v1/specs/validate": {
                "valid": False,
                "problems": [{"field": "training.rounds", "message": words}],
                "spec": None,
            },
        }
    )


def empty() -> FakeApi:
    """An API where nothing has happened yet."""
    return FakeApi(
        {
            "GET /v1/me": {"user": "admin", "role": "admin", "teams": [], "scopes": list(ALL)},
            "GET /v1/projects": {"projects": [], "next": None},
            "GET /v1/models": {"models": []},
            "GET /v1/data/tags": {"tags": []},
            "GET /v1/data/fragments": {"fragments": []},
            "GET /v1/nodes": {"nodes": []},
            "GET /v1/users": {"users": []},
            "GET /v1/tokens": {"tokens": []},
            "GET /v1/audit": {"entries": []},
            "GET /v1/specs/strategies": {"strategies": ["FedAvg"]},
        }
    )


def _after(scope: Scope) -> int:
    query = dict(part.split("=") for part in scope["query_string"].decode().split("&") if part)
    return int(query.get("after", 0))
