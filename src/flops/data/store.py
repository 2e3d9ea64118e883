"""The fragment store: one folder of Parquet files, each complete and self-describing.

Layout below the root (mode 700): ``fragments/<id>.parquet`` and ``incoming/`` for files being written. A
put is written aside, synced and renamed: after a crash at any moment a fragment is there as a whole or not
at all. The index lives in memory and is read back from the files' footers at start. One process at a time
(lock file); any number of threads. A drop does not disturb those who are reading.
"""

import fcntl
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from flops.core.clock import Clock, SystemClock
from flops.core.errors import ConflictError, FailedError, InvalidInputError, NotFoundError
from flops.data.fragments import (
    Fragment,
    FragmentId,
    check_labels,
    check_site,
    check_tags,
    derived_id,
    fragment_id,
    no_match,
)
from flops.data.schemas import shared
from flops.data.writing import FragmentWriter, Limits, read_batches, read_description

BATCH_BYTES = 4 << 20
"""About how much of a fragment is in memory per reader; gRPC holds a second one on its way."""

_log = logging.getLogger(__name__)
_Fragments = list[Fragment]


@dataclass(frozen=True)
class _Entry:
    fragment: Fragment
    schema: pa.Schema
    batch_rows: int


_Entries = list[_Entry]
_Matching = list[tuple[Fragment, pa.Schema, Path]]


class FragmentStore:
    """All fragments below one folder."""

    def __init__(self, root: Path, limits: Limits | None = None, clock: Clock | None = None) -> None:
        """Open (or make) the store: take its lock, clean up after a crash, build the index.

        Raises:
            ConflictError: another process has it open.
        """
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()
        self._fragments = root / "fragments"
        self._incoming = root / "incoming"
        self._mutex = threading.Lock()
        self._index: dict[FragmentId, _Entry] = {}
        for folder in (root, self._fragments, self._incoming):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (root / "lock").open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConflictError(
                f"another data server has '{root}' open - stop it, or give each its own --root"
            ) from error
        for leftover in self._incoming.iterdir():
            leftover.unlink()
        for path in sorted(self._fragments.glob("*.parquet")):
            entry = _read_entry(path)
            if entry:
                self._index[entry.fragment.id] = entry

    def close(self) -> None:
        """Give up the lock; harmless when done twice."""
        self._lock.close()

    def list(self, tags: Iterable[str] = (), site: str | None = None) -> _Fragments:
        """Fragments with any of the tags (none given: all) at a site (None: any), oldest first."""
        wanted = frozenset(tags)
        with self._mutex:
            entries = list(self._index.values())
        found = [entry.fragment for entry in entries if entry.fragment.carries(wanted, site)]
        return sorted(found, key=lambda fragment: (fragment.created, fragment.id))

    def put(
        self,
        schema: pa.Schema,
        batches: Callable[[FragmentWriter], None],
        *,
        tags: Iterable[str],
        site: str,
        allow_metrics: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Fragment:
        """Store one table; the same table, tags and site again give the fragment that is already there.

        ``allow_metrics`` and ``labels`` are no part of a fragment's identity: the last put decides.

        Args:
            batches: writes every batch to the writer it is given; if it raises, nothing is stored.
        Raises:
            InvalidInputError: tags, site or data that cannot be stored.
            UnavailableError: the disk is full.
        """
        tags, site, labels = check_tags(tags), check_site(site), check_labels(labels or {})
        writer = FragmentWriter(self._incoming / f"{secrets.token_hex(16)}.parquet", schema, self._limits)
        try:
            batches(writer)
            content_hash = writer.content_hash()
            if not writer.num_examples:
                raise InvalidInputError("the table has no rows - put at least one example")
            fragment = Fragment(
                id=derived_id(content_hash, tags, site),
                site=site,
                tags=tags,
                num_examples=writer.num_examples,
                size_bytes=0,
                columns={field.name: str(field.type)[:1000] for field in writer.schema},
                allow_metrics=allow_metrics,
                created=self._clock.now(),
                content_hash=content_hash,
                labels=labels,
            )
            with self._mutex:
                known = self._index.get(fragment.id)
            if known and _says_the_same(known.fragment, fragment):
                return known.fragment
            writer.finish(fragment.to_json() | {"decoded_bytes": writer.decoded_bytes})
            return self._publish(writer, fragment)
        finally:
            writer.abandon()

    def drop(
        self, identifier: str | None = None, *, tags: Iterable[str] = (), site: str | None = None
    ) -> _Fragments:
        """Delete one fragment, or all with any of the tags and at the site.

        Raises:
            NotFoundError: there is no such fragment.
            InvalidInputError: neither an id nor tags nor a site were given.
        """
        tags = frozenset(tags)
        if identifier is not None:
            doomed = [self._entry(identifier).fragment]
        elif tags or site is not None:
            doomed = self.list(tags, site)
        else:
            raise InvalidInputError("nothing says which fragments to drop - name an id, tags or a site")
        with self._mutex:
            for fragment in doomed:
                if self._index.pop(fragment.id, None):
                    self._path(fragment.id).unlink(missing_ok=True)
            _sync_folder(self._fragments)
        return doomed

    def read(self, identifier: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """One fragment as it was put: schema, and batches of about 4 MiB read as they are asked for.

        Raises:
            NotFoundError: there is no such fragment.
            FailedError: while iterating; the file is damaged.
        """
        entry = self._entry(identifier)
        return entry.schema, self._batches([entry], entry.schema)

    def read_matching(self, tags: Iterable[str], site: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """All fragments of a site with any of the tags as one table, in the order of their ids.

        The order depends on contents, tags and site alone, so a repeated experiment sees the same rows in
        the same order.

        Raises:
            NotFoundError: no fragment matches.
            InvalidInputError: the fragments' columns differ.
        """
        tags, site = check_tags(tags), check_site(site)
        entries = self._matching(tags, site)
        schema = shared([(entry.fragment.id, entry.schema) for entry in entries])
        return schema, self._batches(entries, schema)

    def matching(self, tags: Iterable[str], site: str) -> _Matching:
        """The fragments that `read_matching` reads, with schema and file: for those who look at some columns.

        Raises:
            NotFoundError: no fragment matches.
        """
        return [
            (entry.fragment, entry.schema, self._path(entry.fragment.id))
            for entry in self._matching(check_tags(tags), check_site(site))
        ]

    def _matching(self, tags: frozenset[str], site: str) -> _Entries:
        with self._mutex:
            entries = [e for e in self._index.values() if e.fragment.carries(tags, site)]
        if not entries:
            raise NotFoundError(no_match(tags, site))
        return sorted(entries, key=lambda entry: entry.fragment.id)

    def _publish(self, writer: FragmentWriter, fragment: Fragment) -> Fragment:
        size_bytes = writer.path.stat().st_size
        with self._mutex:
            known = self._index.get(fragment.id)
            if known and _says_the_same(known.fragment, fragment):
                return known.fragment  # another put of the same was faster
            writer.path.rename(self._path(fragment.id))
            _sync_folder(self._fragments)
            fragment = replace(fragment, size_bytes=size_bytes)
            self._index[fragment.id] = _entry(fragment, writer.schema, writer.decoded_bytes)
        return fragment

    def _batches(self, entries: Iterable[_Entry], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for entry in entries:
            name = entry.fragment.id
            try:
                yield from read_batches(self._path(name), schema, entry.batch_rows)
            except FileNotFoundError as error:
                raise ConflictError(
                    f"fragment {name} was dropped while it was being read - read again"
                ) from error
            except (OSError, pa.ArrowException) as error:
                _log.exception("fragment %s cannot be read", name)
                raise FailedError(
                    f"fragment {name} is damaged on the data server's disk - "
                    f"drop it with 'flops data rm {name}' and put it again"
                ) from error

    def _entry(self, identifier: str) -> _Entry:
        name = fragment_id(identifier)
        with self._mutex:
            entry = self._index.get(name)
        if entry is None:
            raise NotFoundError(f"there is no fragment {name} - see 'flops data ls'")
        return entry

    def _path(self, name: FragmentId) -> Path:
        return self._fragments / f"{name}.parquet"


def _read_entry(path: Path) -> _Entry | None:
    """The index entry of one file; None, with a line in the log, for what is not a whole fragment of ours."""
    try:
        with pq.ParquetFile(path) as parquet:
            description, schema = read_description(parquet)
        size = path.stat().st_size
        fragment = Fragment.from_json(description | {"size_bytes": size})
        if path.stem != fragment.id:
            raise ValueError(f"it says it is {fragment.id}")
        return _entry(fragment, schema, int(description["decoded_bytes"]))
    except (OSError, ValueError, KeyError, TypeError, InvalidInputError, pa.ArrowException) as error:
        # Left where it is: it may be all that remains of somebody's data.
        _log.error("'%s' is not a readable fragment and is ignored: %s", path, error)
        return None


def _says_the_same(one: Fragment, other: Fragment) -> bool:
    return one.allow_metrics == other.allow_metrics and one.labels == other.labels


def _entry(fragment: Fragment, schema: pa.Schema, decoded_bytes: int) -> _Entry:
    rows = BATCH_BYTES * fragment.num_examples // max(1, decoded_bytes)
    return _Entry(fragment, schema, min(max(1, rows), 1 << 16))


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
