"""The client for asyncio programs: `flops.client.sync.Client`, word by word."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx

from flops.client.errors import ManagerAwayError, error_of, told_error, translated
from flops.client.events import HEARTBEAT_S, RESTING, ProjectEvent, StreamParser
from flops.client.login import Login, where_now, whom_to_ask
from flops.client.operations import AsyncOperations
from flops.client.shapes import ModelView, ProjectSummary
from flops.client.wire import CONNECT_TIMEOUT_S, SLOW_TIMEOUT, Call, json_of, pause_before_next
from flops.core.errors import FlopsError, UnavailableError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class AsyncClient(AsyncOperations):
    """See `Client`; for the tasks of one event loop."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        ca: str | None = None,
        *,
        attempts: int = 3,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        asked = whom_to_ask() if url is None else Login(url.rstrip("/"), token or "", ca)
        self.url = asked.url
        self._looks_again = url is None
        self._attempts = attempts
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {asked.token}"} if asked.token else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
            verify=ssl.create_default_context(cadata=asked.ca) if asked.ca is not None else True,
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # pages and streams

    async def iterate_projects(self, *, page: int = 100, **wanted: Any) -> AsyncIterator[ProjectSummary]:
        """See `Client.iterate_projects`."""
        after: str | None = None
        while True:
            found = await self.list_projects(limit=page, after=after, **wanted)
            for project in found["projects"]:
                yield project
            if (after := found["next"]) is None:
                return

    async def iterate_models(self, *, page: int = 1000, **wanted: Any) -> AsyncIterator[ModelView]:
        """See `Client.iterate_models`."""
        after: str | None = None
        while True:
            found = await self.list_models(limit=page, after=after, **wanted)
            for model in found["models"]:
                yield model
            if (after := found["next"]) is None:
                return

    async def iterate_events(
        self, project: str, after: int = 0, *, page: int = 1000
    ) -> AsyncIterator[ProjectEvent]:
        """See `Client.iterate_events`."""
        while events := (await self.list_events(project, after=after, limit=page))["events"]:
            for event in events:
                yield ProjectEvent.from_json(dict(event))
            after = events[-1]["seq"]

    async def follow_events(
        self, project: str, after: int = 0, *, patience_s: float = 600.0
    ) -> AsyncIterator[ProjectEvent]:
        """See `Client.follow_events`."""
        pause_s, away_since = _FIRST_PAUSE_S, None
        while True:
            try:
                async with self.event_stream(project, after) as lines:
                    before, away_since, pause_s = after, None, _FIRST_PAUSE_S
                    parser = StreamParser()
                    async for line in lines:
                        if (event := parser.feed(line)) is not None:
                            after = event.seq
                            yield event
                if after == before and (await self.get_project(project))["state"] in RESTING:
                    return
                continue
            except UnavailableError:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                if now - away_since > patience_s:
                    raise
                self._look_again()
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @asynccontextmanager
    async def event_stream(self, project: str, after: int = 0) -> AsyncIterator[AsyncIterator[str]]:
        """See `Client.event_stream`."""
        call = Call(
            "GET",
            "/v1/projects/{project}/events",
            {"project": project},
            query={"follow": True, "after": after},
            headers={"Accept": "text/event-stream", "Last-Event-ID": after},
        )
        async with self._stream(call, httpx.Timeout(5.0, read=3 * HEARTBEAT_S)) as response:
            yield response.aiter_lines()

    # calling

    def _look_again(self) -> None:
        """Follow the manager that was found on this machine to where it, or its successor, is now."""
        if self._looks_again and (url := where_now()) not in (None, self.url):
            self.url = str(url)
            self._http.base_url = self.url

    async def _send(self, call: Call) -> httpx.Response:
        for attempt in count(1):
            try:
                with translated(self.url):
                    response = await self._http.request(call.method, call.url, **_options(call))
                if not response.is_success:
                    raise error_of(response)
                return response
            except FlopsError as error:
                pause_s = pause_before_next(call, error, attempt, self._attempts)
                if pause_s is None:
                    raise
                await self._sleep(pause_s)
                self._look_again()
        raise AssertionError("unreachable")

    async def _json(self, call: Call) -> Any:
        return json_of(await self._send(call))

    async def _text(self, call: Call) -> str:
        return (await self._send(call)).text

    async def _nothing(self, call: Call) -> None:
        await self._send(call)

    async def _into(self, call: Call, into: BinaryIO) -> None:
        async with self._stream(call) as response:
            async for chunk in response.aiter_bytes(1 << 20):
                await asyncio.to_thread(into.write, chunk)

    async def _lines(self, call: Call) -> AsyncIterator[dict[str, Any]]:
        async with self._stream(call) as response:
            async for text in response.aiter_lines():
                line = json.loads(text)
                if "error" in line:
                    raise told_error(line["error"])
                yield line
                if "result" in line:
                    return
        raise ManagerAwayError(f"the manager at {self.url} ended - try again")

    @asynccontextmanager
    async def _stream(
        self, call: Call, timeout: httpx.Timeout = SLOW_TIMEOUT
    ) -> AsyncIterator[httpx.Response]:
        options = _options(call) | {"timeout": timeout}
        with translated(self.url):
            async with self._http.stream(call.method, call.url, **options) as response:
                if not response.is_success:
                    await response.aread()
                    raise error_of(response)
                yield response


def _options(call: Call) -> dict[str, Any]:
    options = call.options()
    content = options.get("content")
    if content is not None and not isinstance(content, bytes) and not hasattr(content, "__aiter__"):
        options["content"] = _without_blocking(iter(content))
    return options


async def _without_blocking(parts: Any) -> AsyncIterator[bytes]:
    """Parts of a body, read in a thread: a file may be on a slow disk."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part
