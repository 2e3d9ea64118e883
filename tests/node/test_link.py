"""What comes back from a manager, or does not, in words for a data owner."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flops.core.errors import (
    FailedError,
    NotFoundError,
    TooManyRequestsError,
    UnauthorizedError,
    UnavailableError,
)
from flops.node.assignment import Assignment
from flops.node.link import Link
from tests.node.conftest import wanted


class Server:
    """Answers everything with what a test says."""

    def __init__(self) -> None:
        self.status, self.headers, self.content = 200, dict[str, str](), b"{}"
        self.asked: list[tuple[str, str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((self.command, self.path, self.headers.get("authorization")))
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content)

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_the_credential_goes_along(server: Server) -> None:
    server.content = json.dumps({"number": 3, "wanted": [], "logs": []}).encode()
    with Link(server.url, None, "flopsnode_x") as link:
        assert link.sync({"known": -1})["number"] == 3
    assert server.asked == [("POST", "/v1/node/sync", "Bearer flopsnode_x")]


@pytest.mark.parametrize(
    ("status", "content", "kind", "words"),
    [
        (401, {"code": "unauthorized", "detail": "the credential is wrong"}, UnauthorizedError, "is wrong"),
        (404, {"code": "not-found", "detail": "not wanted"}, NotFoundError, "not wanted"),
        (429, {"detail": "slower"}, TooManyRequestsError, "slower"),
        (503, {"detail": "it is starting"}, UnavailableError, "it is starting"),
        (200, [1], FailedError, "is no manager"),
        (200, None, FailedError, "is no manager"),
    ],
)
def test_an_answer_that_is_none_says_what_it_is(
    server: Server, status: int, content: object, kind: type[Exception], words: str
) -> None:
    server.status, server.headers = status, {"retry-after": "7"}
    server.content = json.dumps(content).encode() if content is not None else b"<html>"
    with Link(server.url, None) as link, pytest.raises(kind, match=words) as raised:
        link.sync({})
    if isinstance(raised.value, TooManyRequestsError):
        assert raised.value.retry_after_s == 7.0


def test_nobody_there_is_said_without_advice_for_operators() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Link(url, None) as link, pytest.raises(UnavailableError, match="cannot be reached") as raised:
            link.leave()
    assert "flops up" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "check", "words"),
    [
        (b"x" * 11, None, "larger than the manager said"),
        (b"x" * 9, None, "not what the manager said"),
        (b"y" * 10, None, "not what the manager said"),
        (b"x" * 10, FailedError("not wanted any more"), "not wanted any more"),
    ],
)
def test_code_that_is_not_what_was_promised_is_not_taken(
    server: Server, tmp_path: Path, content: bytes, check: Exception | None, words: str
) -> None:
    promised = Assignment.of(wanted(code=b"x" * 10))
    server.content = content

    def checked() -> None:
        if check is not None:
            raise check

    with Link(server.url, None) as link, pytest.raises(FailedError, match=words):
        link.code(promised, tmp_path / "code.tar", checked)


def test_code_is_taken_as_it_was_promised(server: Server, tmp_path: Path) -> None:
    server.content = b"x" * 3_000_000
    promised = Assignment.of(wanted(code=server.content))
    checks: list[int] = []
    count: Callable[[], None] = lambda: checks.append(1)  # noqa: E731
    with Link(server.url, None) as link:
        link.code(promised, tmp_path / "code.tar", count)
    digest = hashlib.sha256((tmp_path / "code.tar").read_bytes()).hexdigest()
    assert digest == promised.code_sha256
    assert checks
