"""What gets through to MLflow and back, seen by a stand-in that tells what it was sent."""

import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flops.core.settings import Settings
from flops.tracking import GUI_SOCKET
from tests.api.conftest import ManagerProcess, wait_for

_PIECES, _PIECE_BYTES = 400, 1 << 16


async def _echo(request: Request) -> Response:
    answer = JSONResponse(
        {
            "headers": dict(request.headers),
            "path": request.url.path,
            "query": request.url.query,
            "body": (await request.body()).decode(),
        }
    )
    answer.set_cookie("theirs", "1")
    answer.headers["access-control-allow-origin"] = "*"
    answer.headers["content-security-policy"] = "script-src *"
    answer.headers["location"] = "https://evil.example"
    answer.headers["keep-alive"] = "timeout=9"
    return answer


async def _much(request: Request) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(_PIECES):
            yield bytes(_PIECE_BYTES)

    return StreamingResponse(pieces(), media_type="text/html")


@pytest.fixture
def relayed(own_manager: ManagerProcess) -> Iterator[ManagerProcess]:
    """A manager before whose MLflow somebody else took the socket."""
    folder = Settings(own_manager.home).run_dir / "gui"
    folder.mkdir()
    app = Starlette(
        routes=[
            Route("/mlflow/get-artifact", _much),
            Route("/mlflow/{path:path}", _echo, methods=["GET", "POST"]),
        ]
    )
    config = uvicorn.Config(app, uds=str(folder / GUI_SOCKET), log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started, "the stand-in")
    yield own_manager
    server.should_exit = True
    thread.join()


def test_tokens_and_cookies_stay_here_and_none_come_back(relayed: ManagerProcess) -> None:
    client = relayed.client()
    sent = {
        "cookie": "flops-1=secret; theirs=1",
        "x-flops-audiences": "user:alice",
        "x-flops-secret": "guessed",
        "x-forwarded-for": "192.0.2.1",
        "connection": "keep-alive, x-mine",
        "x-mine": "1",
        "accept": "application/json",
    }
    answer = client.get("/mlflow/version?a=%20b&c", headers=sent)
    told = answer.raise_for_status().json()
    assert (told["path"], told["query"]) == ("/mlflow/version", "a=%20b&c")
    assert told["headers"].pop("x-flops-secret") not in ("guessed", relayed.token)
    told["headers"].pop("accept-encoding")
    told["headers"].pop("connection")
    told["headers"].pop("user-agent")
    assert told["headers"] == {
        "accept": "application/json",
        "host": "localhost",
        "x-flops-audiences": "*",
    }
    for name in ("set-cookie", "location", "access-control-allow-origin", "keep-alive"):
        assert name not in answer.headers
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_bodies_pass_as_they_are_up_to_a_limit(relayed: ManagerProcess) -> None:
    client = relayed.client()
    path = "/mlflow/api/2.0/mlflow/runs/search"
    assert client.post(path, content="x" * 1_000_000).json()["body"] == "x" * 1_000_000
    refused = client.post(path, content="x" * 1_100_000)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid-input")


def test_long_answers_stream_and_may_be_left_in_the_middle(relayed: ManagerProcess) -> None:
    client = relayed.client()
    with client.stream("GET", "/mlflow/get-artifact") as answer:
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("sandbox;")
        assert sum(len(piece) for piece in answer.iter_raw()) == _PIECES * _PIECE_BYTES
    for _ in range(70):  # more than are answered at once
        with client.stream("GET", "/mlflow/get-artifact") as answer:
            assert next(answer.iter_raw())

    def is_answered() -> bool:
        return client.get("/mlflow/version").is_success

    wait_for(is_answered, "those who left to be forgotten")
