"""The client for ordinary programs."""

import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from flops.client.errors import ManagerAwayError, error_of, told_error, translated
from flops.client.events import HEARTBEAT_S, RESTING, ProjectEvent, read_stream
from flops.client.login import Login, where_now, whom_to_ask
from flops.client.operations import Operations
from flops.client.shapes import ModelView, ProjectSummary
from flops.client.wire import CONNECT_TIMEOUT_S, SLOW_TIMEOUT, Call, json_of, pause_before_next
from flops.core.errors import FlopsError, UnavailableError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class Client(Operations):
    """One manager, spoken to with one token; safe to use from several threads.

    Args:
        url: None: the manager that the ``flops`` command talks to here, with its token, or whoever takes over
            from that one.
        ca: PEM text of the only authority to trust; None: those of this machine.
        attempts: how often a request is sent that may be sent again: one that never arrived, one that only
            reads, one with an Idempotency-Key.
        timeout_s: for an answer; such as may take minutes have more.
        transport, sleep: replaced in tests.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        ca: str | None = None,
        *,
        attempts: int = 3,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        asked = whom_to_ask() if url is None else Login(url.rstrip("/"), token or "", ca)
        self.url = asked.url
        self._looks_again = url is None
        self._attempts = attempts
        self._sleep = sleep
        # trust_env: a proxy that is set for the internet must not get loopback traffic, nor the token
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {asked.token}"} if asked.token else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            verify=ssl.create_default_context(cadata=asked.ca) if asked.ca is not None else True,
            transport=transport,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # pages and streams

    def iterate_projects(self, *, page: int = 100, **wanted: Any) -> Iterator[ProjectSummary]:
        """All projects, the newest first, page by page; ``wanted`` as for `list_projects`."""
        after: str | None = None
        while True:
            found = self.list_projects(limit=page, after=after, **wanted)
            yield from found["projects"]
            if (after := found["next"]) is None:
                return

    def iterate_models(self, *, page: int = 1000, **wanted: Any) -> Iterator[ModelView]:
        """All versions of all models, the newest first; ``wanted`` as for `list_models`."""
        after: str | None = None
        while True:
            found = self.list_models(limit=page, after=after, **wanted)
            yield from found["models"]
            if (after := found["next"]) is None:
                return

    def iterate_events(self, project: str, after: int = 0, *, page: int = 1000) -> Iterator[ProjectEvent]:
        """Every event so far behind number ``after``."""
        while events := self.list_events(project, after=after, limit=page)["events"]:
            for event in events:
                yield ProjectEvent.from_json(dict(event))
            after = events[-1]["seq"]

    def follow_events(
        self, project: str, after: int = 0, *, patience_s: float = 600.0
    ) -> Iterator[ProjectEvent]:
        """Every event behind number ``after``, each once and in order, as they happen, until the project
        rests; a connection that breaks is taken up where it broke.

        Args:
            patience_s: how long the manager may be away.
        Raises:
            UnavailableError: it was away for longer.
        """
        pause_s, away_since = _FIRST_PAUSE_S, None
        while True:
            try:
                with self.event_stream(project, after) as lines:
                    before, away_since, pause_s = after, None, _FIRST_PAUSE_S
                    for event in read_stream(lines):
                        after = event.seq
                        yield event
                # A manager that shuts down closes its streams, too.
                if after == before and self.get_project(project)["state"] in RESTING:
                    return
                continue
            except UnavailableError:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if now - away_since > patience_s:
                    raise
                self._look_again()
            self._sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @contextmanager
    def event_stream(self, project: str, after: int = 0) -> Iterator[Iterator[str]]:
        """Lines of one event stream from ``after`` on; it ends with the project, or with the manager.

        Raises:
            ManagerAwayError: while reading too: the connection broke, or not even a heartbeat came.
        """
        call = Call(
            "GET",
            "/v1/projects/{project}/events",
            {"project": project},
            query={"follow": True, "after": after},
            headers={"Accept": "text/event-stream", "Last-Event-ID": after},
        )
        with self._stream(call, httpx.Timeout(5.0, read=3 * HEARTBEAT_S)) as response:
            yield response.iter_lines()

    # calling

    def _look_again(self) -> None:
        """Follow the manager that was found on this machine to where it, or its successor, is now."""
        if self._looks_again and (url := where_now()) not in (None, self.url):
            self.url = str(url)
            self._http.base_url = self.url

    def _send(self, call: Call) -> httpx.Response:
        for attempt in count(1):
            try:
                with translated(self.url):
                    response = self._http.request(call.method, call.url, **call.options())
                if not response.is_success:
                    raise error_of(response)
                return response
            except FlopsError as error:
                pause_s = pause_before_next(call, error, attempt, self._attempts)
                if pause_s is None:
                    raise
                self._sleep(pause_s)
                self._look_again()
        raise AssertionError("unreachable")

    def _json(self, call: Call) -> Any:
        return json_of(self._send(call))

    def _text(self, call: Call) -> str:
        return self._send(call).text

    def _nothing(self, call: Call) -> None:
        self._send(call)

    def _into(self, call: Call, into: BinaryIO) -> None:
        with self._stream(call) as response:
            for chunk in response.iter_bytes(1 << 20):
                into.write(chunk)

    def _lines(self, call: Call) -> Iterator[dict[str, Any]]:
        with self._stream(call) as response:
            for text in response.iter_lines():
                line = json.loads(text)
                if "error" in line:
                    raise told_error(line["error"])
                yield line
                if "result" in line:
                    return
        raise ManagerAwayError(f"the manager at {self.url} ended - try again")

    @contextmanager
    def _stream(self, call: Call, timeout: httpx.Timeout = SLOW_TIMEOUT) -> Iterator[httpx.Response]:
        options = call.options() | {"timeout": timeout}
        with (
            translated(self.url),
            self._http.stream(call.method, call.url, **options) as response,
        ):
            if not response.is_success:
                response.read()
                raise error_of(response)
            yield response
