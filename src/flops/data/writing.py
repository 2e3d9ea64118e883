"""One table on its way to disk: checked, hashed, cut into row groups, written as Parquet.

Nothing is visible until `FragmentStore` renames the finished file, so a writer may die at any byte.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flops.core.errors import InvalidInputError, UnavailableError
from flops.data.schemas import conformed, storable

DESCRIPTION = b"flops.fragment"
"""Key of the Parquet footer under which FLOps keeps what it knows about the fragment (JSON)."""

ROW_GROUP_ROWS = 1 << 16
ROW_GROUP_BYTES = 64 << 20
_GIB = 1 << 30
_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one put may cost. Sizes are those of the decoded Arrow data, not of the compressed file."""

    max_fragment_bytes: int = 16 * _GIB
    max_batch_bytes: int = 256 * _MIB
    reserve_bytes: int = 256 * _MIB
    """Disk space that puts leave free."""


class FragmentWriter:
    """Writes one new Parquet file. Not thread-safe; close it with `finish` or `abandon`.

    A row group ends after 65,536 rows or at the batch that fills 64 MiB. The content hash is taken over the
    row groups: the same rows give the same hash however they were cut into batches, as long as 65,536 of
    them fit into 64 MiB (and beyond that if the batches are the same).
    """

    def __init__(self, path: Path, schema: pa.Schema, limits: Limits) -> None:
        """Create the file.

        Raises:
            InvalidInputError: a table with this schema cannot be stored.
            UnavailableError: the disk is full.
        """
        self.schema = storable(schema)
        self.path = path
        self.num_examples = 0
        self.decoded_bytes = 0
        self._limits = limits
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._hash = hashlib.sha256(self.schema.serialize())
        self._check_space()
        try:
            self._parquet = pq.ParquetWriter(path, self.schema, compression="zstd", write_page_checksum=True)
        except (pa.ArrowException, NotImplementedError) as error:
            path.unlink(missing_ok=True)
            raise _not_storable(error) from error

    def write(self, batch: pa.RecordBatch) -> None:
        """Add a batch that may come from anywhere.

        Raises:
            InvalidInputError: broken or unsuitable data, or more than the limits allow.
            UnavailableError: the disk is full.
        """
        try:
            # Arrow trusts offsets that came over the wire; using bad ones would crash the process.
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise _not_storable(error) from error
        if batch.nbytes > self._limits.max_batch_bytes:
            raise InvalidInputError(
                f"one batch of the table has {batch.nbytes} bytes, the limit is "
                f"{self._limits.max_batch_bytes} - send smaller batches"
            )
        self.decoded_bytes += batch.nbytes
        if self.decoded_bytes > self._limits.max_fragment_bytes:
            raise InvalidInputError(
                f"the table has more than {self._limits.max_fragment_bytes} bytes - "
                "put it in parts, or raise --max-fragment-bytes of the data server"
            )
        try:
            batch = conformed(batch, self.schema)
        except (pa.ArrowException, KeyError, ValueError, NotImplementedError) as error:
            raise _not_storable(error) from error
        while batch.num_rows:
            room = ROW_GROUP_ROWS - self._pending_rows
            part, batch = batch.slice(0, room), batch.slice(room)
            self._pending.append(part)
            self._pending_rows += part.num_rows
            self._pending_bytes += part.nbytes
            if self._pending_rows == ROW_GROUP_ROWS or self._pending_bytes >= ROW_GROUP_BYTES:
                self._flush()

    def content_hash(self) -> str:
        """SHA-256 of schema and rows; complete once every batch is written."""
        self._flush()
        return self._hash.hexdigest()

    def finish(self, description: dict[str, Any]) -> None:
        """Write the footer with ``description`` and bring the file to disk.

        Raises:
            UnavailableError: the disk is full.
        """
        self._flush()
        try:
            self._parquet.add_key_value_metadata({DESCRIPTION: json.dumps(description).encode()})
            self._parquet.close()
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise self._disk_error(error) from error
        self._check_readable()

    def abandon(self) -> None:
        """Give up: close and delete the file. Harmless after `finish` and a rename."""
        try:
            self._parquet.close()
        except (OSError, pa.ArrowException):
            # closing writes a footer, which fails again on a full disk; the file is deleted anyway
            pass
        finally:
            self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending_rows:
            return
        table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0
        self._check_space()
        for batch in table.to_batches():
            self._hash.update(batch.serialize())
        try:
            self._parquet.write_table(table, row_group_size=ROW_GROUP_ROWS)
        except OSError as error:
            raise self._disk_error(error) from error
        except (pa.ArrowException, NotImplementedError) as error:
            raise _not_storable(error) from error
        self.num_examples += table.num_rows

    def _check_readable(self) -> None:
        """Read the file back: Parquet takes tables that it cannot give (null lists of fixed size)."""
        rows = 0
        try:
            for batch in read_batches(self.path, self.schema, ROW_GROUP_ROWS):
                rows += batch.num_rows
        except pa.ArrowException as error:
            raise _not_storable(error) from error
        if rows != self.num_examples:
            raise UnavailableError(
                f"{rows} of {self.num_examples} rows reached the data server's disk - put again"
            )

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self._limits.reserve_bytes:
            raise UnavailableError(
                f"the data server's disk has {free >> 20} MiB left and keeps "
                f"{self._limits.reserve_bytes >> 20} MiB free - make room, then put again"
            )

    def _disk_error(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"the data server could not write to its disk: {error} - make room, then put again"
        )


def read_description(parquet: pq.ParquetFile) -> tuple[dict[str, Any], pa.Schema]:
    """What `FragmentWriter.finish` left in a file, and the schema exactly as it was put.

    Parquet's own idea of the schema loses details (timestamps in seconds, order of metadata), the copy that
    Arrow keeps in the footer does not.

    Raises:
        ValueError, TypeError, KeyError, pyarrow.ArrowException: not a file of ours.
    """
    footer = parquet.metadata.metadata or {}
    description = json.loads(footer[DESCRIPTION])
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(footer[b"ARROW:schema"])))
    return dict(description), schema


def read_batches(path: Path, schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Read a stored file as it was put, ``batch_rows`` rows at a time.

    The file is mapped, not read: compressed pages cost no private memory, and it may be deleted meanwhile.

    Raises:
        OSError, pyarrow.ArrowException: it is missing or damaged (every page has a checksum).
    """
    with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(batch_size=batch_rows):
            yield conformed(batch, schema)


def _not_storable(error: Exception) -> InvalidInputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return InvalidInputError(f"the table cannot be stored: {reason} - use columns that Parquet knows")
