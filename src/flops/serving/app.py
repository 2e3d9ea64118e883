"""The routes of one inference server, as a plain ASGI application."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

import flops
from flops.core.errors import FlopsError
from flops.serving import metrics, scoring
from flops.serving.config import Limits
from flops.serving.errors import ModelFailedError, PredictorAwayError, RefusedError, TooSlowError
from flops.serving.metrics import Metrics
from flops.serving.openinference import BINARY_HEADER, OpenInference
from flops.serving.pool import Pool
from flops.serving.scoring import Scoring

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_JSON: Headers = [(b"content-type", b"application/json")]
_RETRY: Headers = [(b"retry-after", b"1")]
_ERROR_CODES: Mapping[int, str] = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    404: "ENDPOINT_NOT_FOUND",
    405: "BAD_REQUEST",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_LIMIT_EXCEEDED",
    415: "BAD_REQUEST",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Response:
    """What is sent back."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, body: bytes, headers: Headers = _JSON) -> None:
        self.status = status
        self.body = body
        self.headers = headers


class App:
    """Answers MLflow's scoring protocol and the Open Inference Protocol for one model."""

    def __init__(
        self,
        pool: Pool,
        scoring: Scoring,
        openinference: OpenInference,
        counts: Metrics,
        limits: Limits,
        *,
        name: str,
        version: str,
        mlflow_version: str,
        secret: str | None,
    ) -> None:
        self._pool = pool
        self._scoring = scoring
        self._openinference = openinference
        self._metrics = counts
        self._limits = limits
        self._mlflow_version = mlflow_version
        self._authorization = None if secret is None else f"Bearer {secret}".encode()
        self._in_flight = 0
        self.warm = False
        """The model has answered."""
        counts.watch(queued=lambda: pool.queued, in_flight=lambda: self._in_flight, ready=lambda: pool.ready)
        self._gets: dict[str, Callable[[], Response]] = {
            "/ping": self._health,
            "/health": self._health,
            "/version": self._version,
            "/metrics": lambda: Response(
                200, counts.text(), [(b"content-type", metrics.CONTENT_TYPE.encode())]
            ),
            "/v2": lambda: _json(
                {"name": "flops", "version": flops.__version__, "extensions": ["binary_tensor_data"]}
            ),
            "/v2/health/live": lambda: _json({"live": True}),
            "/v2/health/ready": self._ready,
        }
        self._open = frozenset(("/ping", "/health", "/v2/health/live", "/v2/health/ready"))
        self._posts: dict[str, Callable[[Scope, Receive], Awaitable[Response]]] = {
            "/invocations": self._invocations
        }
        for model in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{version}"):
            self._gets[model] = lambda: _json(openinference.metadata())
            self._gets[f"{model}/ready"] = lambda: self._ready(name)
            self._posts[f"{model}/infer"] = self._infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # the server speaks no other
        started = time.perf_counter()
        path, method = scope["path"], scope["method"]
        ask = self._posts.get(path) if method == "POST" else None
        try:
            self._check_token(path, scope)
            if ask is not None:
                response = await self._limited(ask, scope, receive)
            else:
                response = self._get(method, path)
        except FlopsError as error:
            response = self._failure(path, error)
        except ConnectionError:
            return  # the caller is gone
        except Exception:
            log.exception("a request to %s failed", path)
            response = _failure(path, 500, "the server failed on this request - see its log")
        if ask is not None:
            kind = "mlflow" if path == "/invocations" else "v2"
            self._metrics.answered(kind, response.status, time.perf_counter() - started)
        headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        body = response.body if method != "HEAD" else b""
        await send({"type": "http.response.body", "body": body})

    def _check_token(self, path: str, scope: Scope) -> None:
        if self._authorization is None or path in self._open:
            return
        given = _header(scope, b"authorization") or b""
        if not hmac.compare_digest(given, self._authorization):
            raise RefusedError(
                "this server asks for a token - send 'Authorization: Bearer TOKEN'", status=401
            )

    def _get(self, method: str, path: str) -> Response:
        answer = self._gets.get(path)
        if answer is not None and method in ("GET", "HEAD"):
            return answer()
        if answer is None and path not in self._posts:
            return _failure(path, 404, f"there is nothing at '{path[:70]}'")
        allowed = b"GET, HEAD" if answer is not None else b"POST"
        response = _failure(path, 405, f"'{path}' takes {allowed.decode()} only")
        return Response(405, response.body, [*response.headers, (b"allow", allowed)])

    async def _limited(
        self, ask: Callable[[Scope, Receive], Awaitable[Response]], scope: Scope, receive: Receive
    ) -> Response:
        if self._in_flight >= self._limits.concurrent:
            raise PredictorAwayError(
                f"{self._limits.concurrent} requests are under way, no more are taken - ask again in a moment"
            )
        self._in_flight += 1
        try:
            return await ask(scope, receive)
        finally:
            self._in_flight -= 1

    async def _invocations(self, scope: Scope, receive: Receive) -> Response:
        body = await self._body(scope, receive)
        content_type = (_header(scope, b"content-type") or b"").decode("latin-1")
        question = self._scoring.question(body, content_type)
        return Response(200, scoring.body_of(await self._pool.ask(question)))

    async def _infer(self, scope: Scope, receive: Receive) -> Response:
        body = await self._body(scope, receive)
        given = _header(scope, BINARY_HEADER)
        if given is not None and not given.isdigit():
            raise RefusedError("Inference-Header-Content-Length is no number")
        question, wanted = self._openinference.question(body, None if given is None else int(given))
        said, header_bytes = self._openinference.body(await self._pool.ask(question), wanted)
        if header_bytes is None:
            return Response(200, said)
        kind: Headers = [(b"content-type", b"application/octet-stream")]
        return Response(200, said, [*kind, (BINARY_HEADER, b"%d" % header_bytes)])

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        announced = _header(scope, b"content-length")
        if announced is not None and (len(announced) > len(str(limit)) or int(announced) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.receive_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise RefusedError(
                f"the body did not arrive within {self._limits.receive_timeout_s:g} s", status=408
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _health(self) -> Response:
        # MLflow's body: one line end.
        return Response(200 if self._is_ready else 503, b"\n", _JSON if self._is_ready else _JSON + _RETRY)

    @property
    def _is_ready(self) -> bool:
        return self.warm and self._pool.ready > 0

    def _version(self) -> Response:
        return Response(200, str(self._pool.about.get("mlflow", self._mlflow_version)).encode())

    def _ready(self, name: str | None = None) -> Response:
        said: dict[str, Any] = {"ready": self._is_ready}
        return _json(said if name is None else {"name": name, **said}, 200 if self._is_ready else 503)

    def _failure(self, path: str, error: FlopsError) -> Response:
        response = _failure(path, _status_of(error), str(error))
        if response.status == 503:
            response.headers = [*response.headers, *_RETRY]
        elif response.status == 401:
            response.headers = [*response.headers, (b"www-authenticate", b"Bearer")]
        return response


def _status_of(error: FlopsError) -> int:
    if isinstance(error, RefusedError | ModelFailedError | PredictorAwayError | TooSlowError):
        return error.status
    return 500


def _failure(path: str, status: int, message: str) -> Response:
    """An error in the words of the protocol that was spoken."""
    said = {"error": message}
    if not path.startswith("/v2"):
        said = {"error_code": _ERROR_CODES.get(status, "BAD_REQUEST"), "message": message}
    return _json(said, status)


def _json(said: Any, status: int = 200) -> Response:
    return Response(status, orjson.dumps(said))


def _too_large(limit: int) -> RefusedError:
    return RefusedError(f"the body is larger than {limit} bytes - send fewer rows at a time", status=413)


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None
