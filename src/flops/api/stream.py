"""Events as they happen: text/event-stream, fed by the store and woken by its commits."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress

from flops.core.errors import NotFoundError
from flops.core.events import Event
from flops.core.ids import ProjectId
from flops.manager import Manager

HEARTBEAT_S = 10.0
_BATCH = 500


async def follow(
    manager: Manager, project: ProjectId, after: int, heartbeat_s: float = HEARTBEAT_S
) -> AsyncIterator[str]:
    """Every event behind number ``after``; ends when the project rests, or with the manager."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    end = manager.broadcast.listen(project, wake)
    try:
        while True:
            changed.clear()
            try:
                events, resting = await asyncio.to_thread(manager.news, project, after, _BATCH)
            except NotFoundError:  # removed meanwhile
                return
            for event in events:
                after = event.seq
                yield _message(event)
            if len(events) == _BATCH:
                continue
            if manager.broadcast.closed or resting:
                return
            try:
                await asyncio.wait_for(changed.wait(), heartbeat_s)
            except TimeoutError:
                yield ": still here\n\n"
    finally:
        end()


def _message(event: Event) -> str:
    data = json.dumps(event.to_json(), separators=(",", ":"))
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n"
