"""The audit log: who asked for what, with which outcome; a chain of hashes.

Each entry's hash covers the entry and the hash before it, so a changed, removed or inserted entry breaks the
chain from there on. Entries missing at the end leave the rest whole: whoever has noted the head, the last
entry's number and hash, sees that too. The database refuses to change or delete entries.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flops.core.clock import Clock, SystemClock
from flops.core.errors import InvalidInputError
from flops.identity import tables
from flops.persistence import reading, writing

START = "0" * 64
"""In place of a hash before the first entry."""
_PAGE = 1000


@dataclass(frozen=True)
class AuditEntry:
    """One request that changed something, wanted to, or was refused."""

    seq: int
    time: float
    user: str
    """Empty: nobody known."""
    token: str
    address: str
    action: str
    """Method and route, such as ``POST /v1/projects``."""
    object: str
    """What it was about: the path."""
    outcome: int
    """The HTTP status of the answer."""
    detail: Mapping[str, Any]
    hash: str

    def expected(self, before: str) -> str:
        """The hash that the entry has to have behind another one's."""
        values = {key: value for key, value in vars(self).items() if key != "hash"}
        text = json.dumps([before, values], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Verification:
    """What a look at the whole log found."""

    entries: int
    head: str
    """``NUMBER:HASH`` of the last entry: note it, to see later that nothing is missing."""
    broken_at: int | None
    """Number of the first entry that is not what was written; None: all are."""
    reason: str | None


class AuditLog:
    """The log in the manager's database. Safe from any thread."""

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()

    def append(
        self,
        *,
        user: str,
        token: str,
        address: str,
        action: str,
        object: str,
        outcome: int,
        detail: Mapping[str, Any] | None = None,
    ) -> AuditEntry:
        """Add an entry; it is on the disk when this returns."""
        table = tables.audit
        with writing(self._engine) as connection:
            last = connection.execute(
                sa.select(table.c.seq, table.c.hash).order_by(table.c.seq.desc()).limit(1)
            ).first()
            made = AuditEntry(
                seq=last.seq + 1 if last is not None else 1,
                time=self._clock.now(),
                user=user[:60],
                token=token,
                address=address[:60],
                action=action[:100],
                object=object.replace("\0", "\N{REPLACEMENT CHARACTER}")[:500],  # PostgreSQL holds no NUL
                outcome=outcome,
                detail=dict(detail or {}),
                hash="",
            )
            values = {**vars(made), "hash": made.expected(last.hash if last is not None else START)}
            connection.execute(sa.insert(table).values(**values))
        return AuditEntry(**values)

    def entries(
        self, after: int = 0, limit: int = _PAGE, *, user: str | None = None, newest: bool = False
    ) -> list[AuditEntry]:
        """Entries behind a number; ``newest``: the last ones, the newest first."""
        table = tables.audit
        order = table.c.seq.desc() if newest else table.c.seq
        query = sa.select(table).where(table.c.seq > after).order_by(order).limit(limit)
        if user is not None:
            query = query.where(table.c.user == user)
        with reading(self._engine) as connection:
            return [_to_entry(row) for row in connection.execute(query)]

    def verify(self, head: str | None = None) -> Verification:
        """Compute the whole chain anew.

        Args:
            head: as noted from an earlier verification.
        Raises:
            InvalidInputError: ``head`` is none.
        """
        noted = _parse(head) if head is not None else None
        before, count = START, 0
        for entry in self._all():
            count += 1
            reason = None
            if entry.seq != count:
                reason = f"entry {count} is missing"
            elif entry.expected(before) != entry.hash:
                reason = f"entry {count} is not what was written"
            elif noted is not None and noted[0] == count and noted[1] != entry.hash:
                reason = f"entry {count} is not the one that was noted"
            if reason is not None:
                return Verification(count, f"{count - 1}:{before}", count, reason)
            before = entry.hash
        if noted is not None and noted[0] > count:
            reason = f"entries {count + 1} to {noted[0]} are missing"
            return Verification(count, f"{count}:{before}", count + 1, reason)
        return Verification(count, f"{count}:{before}", None, None)

    def _all(self) -> Iterator[AuditEntry]:
        after = 0
        while page := self.entries(after):
            yield from page
            after = page[-1].seq


def _parse(head: str) -> tuple[int, str]:
    number, _, digest = head.partition(":")
    if not number.isdecimal() or len(number) > 15 or len(digest) != len(START):
        raise InvalidInputError("that is no head of the audit log - use NUMBER:HASH as 'verify' prints it")
    return int(number), digest


def _to_entry(row: Any) -> AuditEntry:
    return AuditEntry(
        row.seq,
        row.time,
        row.user,
        row.token,
        row.address,
        row.action,
        row.object,
        row.outcome,
        row.detail,
        row.hash,
    )
