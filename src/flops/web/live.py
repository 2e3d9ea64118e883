"""Pages that stay true: regions of a page, made anew when something happened, sent as they change.

A stream is one `text/event-stream` of messages ``{"regions": {id: html}}``. It is woken by the API's own
event stream and looks now and then besides, because not everything that is shown is an event.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress

from starlette.responses import StreamingResponse

from flops.web.call import Api, RefusedError

Render = Callable[[], Awaitable[Mapping[str, str]]]
_TOGETHER_S = 0.05
"""Events within it are shown at once: a person does not see the difference, a browser does."""
_SPACE_S = 0.3
"""Between two looks, of which each is a few requests of the person's."""
_BUSY = (429, 503)
_LOOK_S = 2.0
_HEARTBEAT = ": still here\n\n"
_RETRY = "retry: 1000\n\n"
_TICKING = re.compile(r'(data-(?:ago|since)="[^"]*">)[^<]*')
"""What the page's script keeps true by itself."""


async def changes(
    render: Render, woken: asyncio.Event, closing: asyncio.Event, look_s: float = _LOOK_S
) -> AsyncIterator[str]:
    """Messages for as long as somebody reads them; ends with the application or the right to see."""
    sent: dict[str, bytes] = {}
    yield _RETRY
    while not closing.is_set():
        woken.clear()
        looked = time.monotonic()
        try:
            regions = await render()
        except RefusedError as error:
            if error.status in _BUSY:
                yield _HEARTBEAT
                await _any_of(closing, timeout_s=look_s)
                continue
            yield "event: reload\ndata: {}\n\n"
            return
        digests = {name: _digest(html) for name, html in regions.items()}
        new = {name: html for name, html in regions.items() if sent.get(name) != digests[name]}
        sent.update(digests)
        if new:
            yield f"data: {json.dumps({'regions': new}, ensure_ascii=False)}\n\n"
        else:
            yield _HEARTBEAT
        await _any_of(woken, closing, timeout_s=look_s)
        if woken.is_set():
            await _any_of(closing, timeout_s=max(_TOGETHER_S, looked + _SPACE_S - time.monotonic()))


def _digest(html: str) -> bytes:
    return hashlib.sha256(_TICKING.sub(r"\1", html).encode()).digest()


async def wake_on_events(api: Api, project: str, after: int, woken: asyncio.Event) -> None:
    """Set ``woken`` whenever something happens in a project; comes back when it rests, or cannot be seen."""
    with suppress(RefusedError):
        async with api.open(
            "GET",
            "projects",
            project,
            "events",
            params={"follow": "true", "after": after},
            headers={"accept": "text/event-stream"},
        ) as answer:
            async for piece in answer.body:
                if not piece.startswith(b":"):
                    woken.set()


def stream(messages: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(
        messages,
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _any_of(*events: asyncio.Event, timeout_s: float) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
