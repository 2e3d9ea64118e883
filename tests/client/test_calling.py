"""What the client sends, sends again, and makes of answers."""

import asyncio
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from flops import AsyncClient, Client
from flops.client import ManagerAwayError
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    TooManyRequestsError,
    UnavailableError,
)
from flops.core.settings import Settings

Answer = httpx.Response | Exception
PROJECT = "p-7k2mqd"


class Server:
    """Gives prepared answers in order, the last one for ever, and notes requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.naps: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self) -> Client:
        transport = httpx.MockTransport(self)
        return Client("http://manager", "secret", transport=transport, sleep=self.naps.append)


def ok(value: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=value)


def problem(status: int, code: str, detail: str) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": detail})


REFUSED = httpx.ConnectError("connection refused")
BROKEN = httpx.RemoteProtocolError("server disconnected")


def test_a_call_is_what_the_document_says() -> None:
    server = Server(ok({"id": PROJECT}))
    with server.client() as client:
        client.submit_project(spec={"repo": "/r"})
        client.list_projects(state=["failed", "paused"], limit=5)
        client.extend_project("p/../x", rounds=3, idempotency_key="mine")
        client.deploy_model(PROJECT, onnx=True)
    first, second, third, fourth = server.requests
    assert (first.method, first.url.path) == ("POST", "/v1/projects")
    assert json.loads(first.content) == {"spec": {"repo": "/r"}}
    assert first.headers["authorization"] == "Bearer secret"
    assert len(first.headers["idempotency-key"]) == 32
    assert str(second.url) == "http://manager/v1/projects?state=failed&state=paused&limit=5"
    assert third.url.raw_path == b"/v1/projects/p%2F..%2Fx/extend"
    assert third.headers["idempotency-key"] == "mine"
    assert str(fourth.url).endswith("/deployment?onnx=true")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (problem(404, "not-found", "no such project"), NotFoundError, "no such project"),
        (problem(409, "conflict", "it runs"), ConflictError, "it runs"),
        (problem(500, "error", "internal"), FlopsError, "internal"),
        (httpx.Response(500, text="<html>oops</html>"), FailedError, "<html>oops</html>"),
        (httpx.Response(418), InvalidInputError, "the manager answered with status 418"),
        (httpx.Response(503), UnavailableError, "the manager answered with status 503"),
        (ok({"message": "from a model"}, 400), InvalidInputError, "from a model"),
        (httpx.Response(200, text="no JSON"), FailedError, "GET http://manager/v1/projects/p-7k2mqd did not"),
    ],
)
def test_errors_are_flops_errors(answer: httpx.Response, kind: type[FlopsError], message: str) -> None:
    with Server(answer).client() as client, pytest.raises(FlopsError) as raised:
        client.get_project(PROJECT)
    assert type(raised.value) is kind
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "failures", "sent"),
    [
        (lambda client: client.get_project(PROJECT), [REFUSED, BROKEN], 3),
        (lambda client: client.submit_project(spec={}), [BROKEN, REFUSED], 3),
        (lambda client: client.stop_project(PROJECT), [REFUSED, REFUSED], 3),
        (lambda client: client.get_project(PROJECT), [httpx.Response(429, headers={"Retry-After": "7"})], 2),
    ],
)
def test_what_may_be_sent_again_is_with_the_same_key(
    call: Callable[[Client], object], failures: Sequence[Answer], sent: int
) -> None:
    server = Server(*failures, ok({"id": PROJECT}))
    with server.client() as client:
        call(client)
    assert len(server.requests) == sent
    assert len({request.headers.get("idempotency-key") for request in server.requests}) == 1
    assert server.naps == ([7.0] if sent == 2 else pytest.approx([0.1, 0.4]))


@pytest.mark.parametrize(
    ("call", "failure", "sent"),
    [
        (lambda client: client.stop_project(PROJECT), BROKEN, 1),  # it may have been done
        (lambda client: client.get_project(PROJECT), httpx.ReadTimeout("slow"), 1),
        (lambda client: client.get_project(PROJECT), REFUSED, 3),
        (lambda client: client.put_fragment(io.BytesIO(b"x"), tag=["t"]), BROKEN, 1),
    ],
)
def test_what_may_have_been_done_is_not_sent_again_and_attempts_end(
    call: Callable[[Client], object], failure: Exception, sent: int
) -> None:
    server = Server(failure)
    with server.client() as client, pytest.raises(ManagerAwayError, match="the manager at http://manager"):
        call(client)
    assert len(server.requests) == sent


def test_too_many_requests_say_when_to_come_back() -> None:
    server = Server(httpx.Response(429, headers={"Retry-After": "3"}))
    with server.client() as client, pytest.raises(TooManyRequestsError) as raised:
        client.get_project(PROJECT)
    assert raised.value.retry_after_s == 3.0


def test_pages_are_followed() -> None:
    pages = [
        ok({"projects": [{"id": 1}, {"id": 2}], "next": "c"}),
        ok({"projects": [{"id": 3}], "next": None}),
    ]
    server = Server(*pages)
    with server.client() as client:
        found = list(client.iterate_projects(text="mnist", page=2))
    assert [project["id"] for project in found] == [1, 2, 3]  # type: ignore[comparison-overlap]
    assert [dict(request.url.params) for request in server.requests] == [
        {"text": "mnist", "limit": "2"},
        {"text": "mnist", "limit": "2", "after": "c"},
    ]


def stream(*events: tuple[int, str]) -> httpx.Response:
    lines = [": still here", ""]
    for seq, state in events:
        data = {"seq": seq, "time": 1.0, "kind": "project.state", "data": {"state": state}}
        lines += [f"id: {seq}", f"data: {json.dumps(data)}", ""]
    return httpx.Response(200, text="\n".join(lines) + "\n")


def test_a_manager_that_was_found_here_is_followed_to_the_one_that_took_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOPS_HOME", str(tmp_path))
    settings = Settings(tmp_path)
    settings.token_file.write_text("secret")
    settings.address_file.write_text('{"url": "http://127.0.0.1:1", "pid": 1}')
    asked: list[int | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.port)
        if request.url.port == 1:
            settings.address_file.write_text('{"url": "http://127.0.0.1:2", "pid": 2}')
            raise REFUSED
        return ok({"state": "finished"})

    with Client(transport=httpx.MockTransport(answer), sleep=lambda _: None) as client:
        assert client.get_project(PROJECT)["state"] == "finished"
        assert client.url == "http://127.0.0.1:2"
    fixed = Client("http://127.0.0.1:1", "x", transport=httpx.MockTransport(answer), sleep=lambda _: None)
    with fixed, pytest.raises(ManagerAwayError):
        fixed.get_project(PROJECT)
    assert asked == [1, 2, 1, 1, 1]


def test_an_event_stream_goes_on_where_it_broke() -> None:
    server = Server(
        stream((1, "submitted"), (2, "preparing")),
        REFUSED,
        stream((3, "failed")),
        stream(),
        ok({"state": "failed"}),
    )
    with server.client() as client:
        assert [event.seq for event in client.follow_events(PROJECT)] == [1, 2, 3]
    asked = [request.headers.get("last-event-id") for request in server.requests]
    assert asked == ["0", "2", "2", "3", None]


def test_patience_with_a_manager_that_is_away_ends() -> None:
    with Server(REFUSED).client() as client, pytest.raises(ManagerAwayError):
        list(client.follow_events(PROJECT, patience_s=-1))


def test_lines_of_long_work_end_with_its_result_or_its_error() -> None:
    text = '{"progress": "one"}\n{"result": {"name": "x"}}\n'
    with Server(httpx.Response(200, text=text)).client() as client:
        assert list(client.make_base_image()) == [{"progress": "one"}, {"result": {"name": "x"}}]
    text = '{"error": {"code": "conflict", "detail": "no"}}\n'
    with Server(httpx.Response(200, text=text)).client() as client, pytest.raises(ConflictError, match="no"):
        list(client.make_base_image())
    cut = httpx.Response(200, text='{"progress": "one"}\n')
    with Server(cut).client() as client, pytest.raises(ManagerAwayError, match="ended - try again"):
        list(client.make_base_image())


def test_the_asynchronous_client_does_the_same() -> None:
    server = Server(
        REFUSED,
        ok({"id": PROJECT}),
        ok({"projects": [{"id": 1}], "next": None}),
        stream((1, "submitted")),
        stream((2, "failed")),
        stream(),
        ok({"state": "failed"}),
        httpx.Response(200, text='{"result": 1}\n'),
        ok({"id": "f-1"}),
        httpx.Response(200, content=b"tar"),
        problem(404, "not-found", "gone"),
    )
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    async def scenario() -> list[Any]:
        transport = httpx.MockTransport(server)
        into = io.BytesIO()
        async with AsyncClient("http://manager", "secret", transport=transport, sleep=nap) as client:
            found: list[Any] = [await client.submit_project(spec={})]
            found += [project async for project in client.iterate_projects()]
            found += [event.seq async for event in client.follow_events(PROJECT)]
            found += [line async for line in client.make_base_image()]
            found.append(await client.put_fragment(io.BytesIO(b"parquet"), tag=["t"]))
            await client.get_model_archive("m", 1, into)
            found.append(into.getvalue())
            with pytest.raises(NotFoundError, match="gone"):
                await client.get_project(PROJECT)
        return found

    found = asyncio.run(scenario())
    assert found == [{"id": PROJECT}, {"id": 1}, 1, 2, {"result": 1}, {"id": "f-1"}, b"tar"]
    assert naps == [0.1]
    (sent,) = [request.content for request in server.requests if "fragments" in request.url.path]
    assert sent == b"parquet"


def test_without_an_address_it_is_this_homes_manager(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOPS_MANAGER", "FLOPS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLOPS_HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no manager runs on .* - start it with 'flops up'"):
        Client()
    (tmp_path / "manager.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": 1}))
    (tmp_path / "token").write_text("secret\n")
    with Client() as client:
        assert client.url == "http://127.0.0.1:1"
    monkeypatch.setenv("FLOPS_MANAGER", "https://elsewhere/")
    monkeypatch.setenv("FLOPS_TOKEN", "t")
    with Client() as client:
        assert client.url == "https://elsewhere"


def test_importing_flops_imports_no_client() -> None:
    import subprocess
    import sys

    code = "import flops, sys; sys.exit('httpx' in sys.modules); flops.Client"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
