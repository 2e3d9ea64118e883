"""The manager's REST API as methods. Answers are plain JSON values; errors are `FlopsError` children."""

import json
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from flops.core.errors import (
    BY_CODE,
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)

_BY_CODE: Mapping[str, type[FlopsError]] = {**BY_CODE, FlopsError.code: FlopsError}
_BY_STATUS: Mapping[int, type[FlopsError]] = {
    401: UnauthorizedError,
    403: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}
_HEARTBEAT_S = 10.0
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
# Mocking a data set may fetch it first; writing a model's archive may need its copy from the artifact store.
_LONG_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


class ManagerAwayError(UnavailableError):
    """Nobody answers at the manager's address: it was stopped or killed, or is starting."""


class ManagerClient:
    """One manager, spoken to with one token. Not for use by several threads."""

    def __init__(self, url: str, token: str, ca: str | None = None) -> None:
        """Args: ca is the PEM text of the only authority to trust; None: those of this machine."""
        self.url = url
        # trust_env: a proxy that is set for the internet must not get loopback traffic, nor the token
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=_TIMEOUT,
            trust_env=False,
            verify=ssl.create_default_context(cadata=ca) if ca is not None else True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # manager

    def health(self, *, timeout_s: float = 5.0) -> dict[str, Any]:
        return self._object("GET", "/v1/health", timeout=httpx.Timeout(timeout_s))

    def shutdown(self, *, force: bool) -> None:
        """End the manager; unless forced it refuses (`ConflictError`) while projects run."""
        self._call("POST", "/v1/shutdown", json={"force": force})

    def ui(self) -> dict[str, Any]:
        return self._object("POST", "/v1/ui", timeout=_LONG_TIMEOUT)

    # users

    def me(self) -> dict[str, Any]:
        return self._object("GET", "/v1/me")

    def users(self) -> list[dict[str, Any]]:
        return self._list("/v1/users", "users")

    def add_user(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return self._object("POST", "/v1/users", json=wanted)

    def change_user(self, name: str, change: Mapping[str, Any]) -> dict[str, Any]:
        return self._object("PATCH", _path("users", name), json=change)

    def tokens(self, user: str | None = None) -> list[dict[str, Any]]:
        return self._list("/v1/tokens", "tokens", **({} if user is None else {"user": user}))

    def add_token(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return self._object("POST", "/v1/tokens", json=wanted)

    def revoke_token(self, number: str) -> dict[str, Any]:
        return self._object("DELETE", _path("tokens", number))

    def audit(self, *, user: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
        """The last entries of the audit log, the newest first."""
        more = {} if user is None else {"user": user}
        return self._list("/v1/audit", "entries", limit=limit, newest=True, **more)

    def verify_audit(self, head: str | None = None) -> dict[str, Any]:
        return self._object("POST", "/v1/audit/verify", json={"head": head}, timeout=_LONG_TIMEOUT)

    # projects

    def submit(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        return self._object("POST", "/v1/projects", json={"spec": spec})

    def projects(self) -> list[dict[str, Any]]:
        return self._list("/v1/projects", "projects")

    def project(self, project: str) -> dict[str, Any]:
        return self._object("GET", _path("projects", project))

    def stop(self, project: str) -> None:
        self._call("POST", _path("projects", project, "stop"))

    def pause(self, project: str) -> None:
        self._call("POST", _path("projects", project, "pause"))

    def resume(self, project: str) -> dict[str, Any]:
        return self._object("POST", _path("projects", project, "resume"))

    def extend(self, project: str, rounds: int) -> dict[str, Any]:
        return self._object("POST", _path("projects", project, "extend"), json={"rounds": rounds})

    def remove(self, project: str, *, force: bool) -> None:
        self._call("DELETE", _path("projects", project), params={"force": force})

    def events(self, project: str, after: int = 0) -> list[dict[str, Any]]:
        return self._list(_path("projects", project, "events"), "events", after=after)

    @contextmanager
    def event_stream(self, project: str, after: int) -> Iterator[Iterator[str]]:
        """Lines of the event stream from ``after`` on; it ends with the project, or with the manager.

        Raises:
            ManagerAwayError: while reading too: the connection broke, or not even a heartbeat came.
        """
        with (
            _translated(self.url),
            self._http.stream(
                "GET",
                _path("projects", project, "events"),
                params={"follow": "true", "after": after},
                headers={"Accept": "text/event-stream", "Last-Event-ID": str(after)},
                timeout=httpx.Timeout(5.0, read=3 * _HEARTBEAT_S),
            ) as response,
        ):
            _check(response)
            yield response.iter_lines()

    def logs(self, project: str, service: str | None, tail: int | None) -> dict[str, str]:
        wanted = {"service": service, "tail": tail}
        answer = self._object(
            "GET",
            _path("projects", project, "logs"),
            params={key: value for key, value in wanted.items() if value is not None},
        )
        return dict(answer["logs"])

    # served models

    def deploy(self, project: str, *, onnx: bool = False) -> dict[str, Any]:
        path = _path("projects", project, "deployment")
        return self._object("PUT", path, params={"onnx": onnx}, timeout=_LONG_TIMEOUT)

    def undeploy(self, project: str) -> dict[str, Any]:
        return self._object("DELETE", _path("projects", project, "deployment"))

    def predict(self, project: str, content_type: str, body: bytes) -> dict[str, Any]:
        """The model's answer, in MLflow's scoring protocol.

        Raises:
            InvalidInputError: the model does not take this input; its server says why.
        """
        return self._object(
            "POST",
            _path("projects", project, "predictions"),
            content=body,
            headers={"Content-Type": content_type},
        )

    # data

    def put_fragment(
        self,
        parquet: BinaryIO,
        tags: Sequence[str],
        site: str,
        *,
        allow_metrics: bool,
        labels: Sequence[str] = (),
        node: str | None = None,
    ) -> dict[str, Any]:
        """Args: labels are ``NAME=VALUE``."""
        where = {} if node is None else {"node": node}
        return self._object(
            "POST",
            "/v1/data/fragments",
            params={"tag": list(tags), "site": site, "allow_metrics": allow_metrics, "label": list(labels)}
            | where,
            content=iter(lambda: parquet.read(1 << 20), b""),
            headers={"Content-Type": "application/vnd.apache.parquet"},
            timeout=_LONG_TIMEOUT,
        )

    def fragments(self, tags: Sequence[str], site: str | None) -> list[dict[str, Any]]:
        wanted: dict[str, Any] = {"tag": list(tags)} | ({"site": site} if site else {})
        return self._list("/v1/data/fragments", "fragments", **wanted)

    def drop_fragment(self, fragment: str) -> None:
        self._call("DELETE", _path("data", "fragments", fragment))

    def mock(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        answer = self._object("POST", "/v1/data/mock", json=request, timeout=_LONG_TIMEOUT)
        return list(answer["fragments"])

    # models

    def models(self) -> list[dict[str, Any]]:
        return self._list("/v1/models", "models")

    def model_archive(self, name: str, version: str, into: BinaryIO) -> None:
        path = _path("models", name, "versions", version, "archive")
        with _translated(self.url), self._http.stream("GET", path, timeout=_LONG_TIMEOUT) as answer:
            _check(answer)
            for chunk in answer.iter_bytes(1 << 20):
                into.write(chunk)

    # images

    def images(self) -> list[dict[str, Any]]:
        return self._list("/v1/images", "images")

    def make_base(self, request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        """Make a base image; ``progress`` is told what is being done.

        Raises:
            FlopsError: as the manager says.
        """
        with (
            _translated(self.url),
            self._http.stream(
                "POST", "/v1/images/base", json=dict(request), timeout=_LONG_TIMEOUT
            ) as response,
        ):
            _check(response)
            for text in response.iter_lines():
                line = json.loads(text)
                if "progress" in line:
                    progress(str(line["progress"]))
                elif "error" in line:
                    kind = _BY_CODE.get(line["error"]["code"], FailedError)
                    raise kind(str(line["error"]["detail"]))
                else:
                    return dict(line["result"])
        raise ManagerAwayError(f"the manager at {self.url} ended - try again")

    # calling

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        with _translated(self.url):
            response = self._http.request(method, path, **options)
            _check(response)
        return response

    def _object(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        value = self._json(method, path, **options)
        if not isinstance(value, dict):
            raise FailedError(f"{method} {self.url}{path} did not answer with an object - is that a manager?")
        return value

    def _list(self, path: str, key: str, **params: Any) -> list[dict[str, Any]]:
        value = self._json("GET", path, params=params)
        return list(value[key] if isinstance(value, dict) else value)

    def _json(self, method: str, path: str, **options: Any) -> Any:
        response = self._call(method, path, **options)
        try:
            return response.json()
        except ValueError as error:
            raise FailedError(
                f"{method} {self.url}{path} did not answer with JSON - is that a manager?"
            ) from error


def parquet_file(path: Path) -> BinaryIO:
    """The file, open, if it is Parquet; a CSV file is turned into Parquet in memory.

    Raises:
        InvalidInputError: it cannot be read as either.
    """
    if path.suffix.lower() == ".csv":
        return _csv_as_parquet(path)
    file = path.open("rb")
    start = file.read(4)
    file.seek(0)
    if start != b"PAR1":
        file.close()
        raise InvalidInputError(f"'{path}' is no Parquet file - give a .parquet or a .csv file")
    return file


def _csv_as_parquet(path: Path) -> BinaryIO:
    import io

    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        table = pyarrow.csv.read_csv(path)
    except pa.ArrowInvalid as error:
        raise InvalidInputError(f"'{path}' cannot be read as CSV: {error}") from error
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    buffer.seek(0)
    return buffer


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.TimeoutException as error:
        raise ManagerAwayError(
            f"the manager at {url} did not answer in time - try again, or see its log"
        ) from error
    except httpx.TransportError as error:
        raise ManagerAwayError(
            f"the manager at {url} cannot be reached ({error}) - start it with 'flops up'"
        ) from error


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        body = response.json()
    except ValueError:
        body = {}
    problem = body if isinstance(body, dict) else {}
    kind = _BY_CODE.get(problem.get("code", "")) or _BY_STATUS.get(response.status_code)
    if kind is None:
        kind = FailedError if response.is_server_error else InvalidInputError
    # "message" is how a model's server says it, in MLflow's protocol
    detail = problem.get("detail") or problem.get("message") or problem.get("title")
    detail = detail or response.text[:500].strip()
    text = detail if isinstance(detail, str) else str(detail)
    raise kind(text or f"the manager answered with status {response.status_code}")
