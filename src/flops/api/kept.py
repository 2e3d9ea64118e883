"""Answers of reads, kept as they were sent until what they tell of changes: many clients ask for the same,
and most of what they ask for rests.
"""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from flops.core.clock import Clock, SystemClock
from flops.core.recent import Recent
from flops.manager import Broadcast

_KEPT_S = 60.0
"""Who changes the database past the manager waits so long for it."""
_MOST_BYTES, _LARGEST_BYTES = 8 << 20, 64 << 10


@dataclass(frozen=True)
class Made:
    """An answer, in JSON.

    Args:
        lasts: until something is told to the broadcast, and not only for now.
    """

    body: bytes
    lasts: bool = True


class KeptAnswers:
    """Belongs to one event loop. Who may read what is checked before.

    Args:
        broadcast: tells of every change.
        may_act: whether nobody else changes things meanwhile: a manager that was frozen, and whose work
            another one does, tells nothing from memory.
    """

    def __init__(self, broadcast: Broadcast, may_act: Callable[[], bool], clock: Clock | None = None) -> None:
        self._broadcast = broadcast
        self._may_act = may_act
        self._kept: Recent[Hashable, bytes] = Recent(
            clock or SystemClock(), kept_s=_KEPT_S, most=_MOST_BYTES, size=len
        )
        self._making: dict[Hashable, asyncio.Task[bytes]] = {}

    async def answer(self, subject: str | None, asked: Hashable, make: Callable[[], Made]) -> Response:
        """The kept answer, or a new one; those who ask for the same at the same time share one.

        Args:
            subject: whose changes it tells of; None: anything's.
            asked: for what, by whomever it differs for.
            make: runs in a thread.
        """
        version = self._broadcast.version(subject)
        body = self._kept.get((subject, asked), version) if self._may_act() else None
        if body is None:
            key = (subject, asked, version)
            making = self._making.get(key)
            if making is None:
                making = self._making[key] = asyncio.create_task(self._make(subject, asked, version, make))
                making.add_done_callback(lambda done: self._end(key, done))
            body = await asyncio.shield(making)  # others wait for it, too
        return Response(body, media_type="application/json")

    async def _make(
        self, subject: str | None, asked: Hashable, version: int, make: Callable[[], Made]
    ) -> bytes:
        made = await run_in_threadpool(make)
        if made.lasts and len(made.body) <= _LARGEST_BYTES:
            self._kept.keep((subject, asked), made.body, version)
        return made.body

    def _end(self, key: Hashable, done: asyncio.Task[bytes]) -> None:
        del self._making[key]
        if not done.cancelled():
            done.exception()  # asyncio complains of one that nobody waits for any more
