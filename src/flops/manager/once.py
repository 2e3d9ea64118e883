"""Requests that are carried out once, however often they are sent: the Idempotency-Key of creating requests.

The key is committed, with the id of the project that may come of it, before anything is done; the answer
afterwards. Where a manager is killed in between, the next one carries the request out again, under the same
project id, or refuses it where that could do it twice.
Keys are kept for `KEPT_S`. Thread-safe: requests with one key take turns.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from flops.core.clock import Clock
from flops.core.errors import ConflictError
from flops.core.ids import ProjectId, new_project_id
from flops.manager import tables
from flops.persistence import writing

KEPT_S = 24 * 3600.0
_LOCKS = 64

CarryOut = Callable[[ProjectId], Mapping[str, Any]]
"""Does what was requested, under the given id where it makes a project; answers what the caller is told."""


@dataclass(frozen=True)
class OnceRequest:
    """What tells one request from another.

    Args:
        caller: who sent it: keys of different callers never meet.
        key: None: it is carried out however often it comes.
        operation: such as ``POST /v1/projects``.
        body: JSON.
        harmless: carried out again after a kill, it does nothing twice.
    """

    caller: str
    key: str | None
    operation: str
    body: Any
    harmless: bool = True

    @property
    def request_hash(self) -> str:
        text = json.dumps([self.operation, self.body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Once:
    """All keys of one database."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def answer(self, request: OnceRequest, carry_out: CarryOut) -> tuple[dict[str, Any], bool]:
        """The answer, and whether it was given before.

        What raises leaves no trace: it may be sent again under its key, corrected too.

        Raises:
            ConflictError: the key came with another request before.
        """
        caller, key = request.caller, request.key
        if key is None:
            return dict(carry_out(new_project_id())), False
        with self._locks[hash((caller, key)) % _LOCKS]:
            with writing(self._engine) as connection:
                project, known = self._claim(connection, request, key)
            if known is not None:
                return known, True
            try:
                answer = dict(carry_out(project))
            except Exception:
                self._update(caller, key, None)
                raise
            self._update(caller, key, answer)
            return answer, False

    def _claim(
        self, connection: Connection, request: OnceRequest, key: str
    ) -> tuple[ProjectId, dict[str, Any] | None]:
        table, now = tables.answers, self._clock.now()
        connection.execute(sa.delete(table).where(table.c.created < now - KEPT_S))
        mine = sa.and_(table.c.caller == request.caller, table.c.key == key)
        row = connection.execute(sa.select(table).where(mine)).first()
        if row is None:
            project = new_project_id()
            connection.execute(
                sa.insert(table).values(
                    caller=request.caller,
                    key=key,
                    request=request.request_hash,
                    project=project,
                    created=now,
                )
            )
            return project, None
        if row.request != request.request_hash:
            raise ConflictError(
                f"Idempotency-Key '{key[:60]}' came with another request before - use a new key for a "
                "new request"
            )
        if row.answer is None and not request.harmless:
            raise ConflictError(
                f"the request with Idempotency-Key '{key[:60]}' was cut off when the manager ended, and may "
                "have been carried out - look at its object, then decide, and use a new key"
            )
        return ProjectId(row.project), row.answer

    def _update(self, caller: str, key: str, answer: dict[str, Any] | None) -> None:
        """Keep the answer; None: forget the key."""
        table = tables.answers
        mine = sa.and_(table.c.caller == caller, table.c.key == key)
        change = sa.delete(table) if answer is None else sa.update(table).values(answer=answer)
        with writing(self._engine) as connection:
            connection.execute(change.where(mine))
