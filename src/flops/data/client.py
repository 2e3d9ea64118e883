"""The data client: puts, lists, reads and drops fragments of one data server.

Needs nothing but pyarrow, so agents carry it. One client may be used by many threads; it connects on first
use and again after the server came back.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
from pyarrow import flight

from flops.core.errors import FailedError, InvalidInputError
from flops.data.fragments import DEFAULT_SITE, Fragment, check_labels, check_site, check_tags, fragment_id
from flops.data.protocol import answered, encode, translated

_BATCH_BYTES = 4 << 20
_Fragments = list[Fragment]
_Objects = list[dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """How much a data server holds."""

    fragments: int
    size_bytes: int


class DataClient:
    """A connection to one data server.

    Every method raises children of `FlopsError`: `UnavailableError` when the server is away or slower than
    the timeouts, `UnauthorizedError` for a wrong token, and what else the method names.
    """

    def __init__(
        self,
        location: str,
        token: str,
        *,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        timeout_s: float = 30.0,
        transfer_timeout_s: float = 3600.0,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            location: ``grpc+unix:///PATH`` (see `unix_location`) or ``grpc+tls://HOST:PORT``.
            tls_ca: PEM certificates to trust instead of the system's.
            tls_cert, tls_key: PEM files to prove oneself with, to a server that asks for it.
            timeout_s: for list, drop and ping.
            transfer_timeout_s: for a whole put or get.
        Raises:
            InvalidInputError: no such location or certificate file.
        """
        self.location = location
        headers = [(b"authorization", f"Bearer {token}".encode())]
        self._short = flight.FlightCallOptions(timeout=timeout_s, headers=headers)
        self._long = flight.FlightCallOptions(timeout=transfer_timeout_s, headers=headers)
        try:
            files = {"tls_root_certs": tls_ca, "cert_chain": tls_cert, "private_key": tls_key}
            certificates = {name: file.read_bytes() for name, file in files.items() if file is not None}
            self._flight = flight.FlightClient(location, **certificates)
        except OSError as error:
            raise InvalidInputError(
                f"the certificate file '{error.filename}' cannot be read ({error.strerror}) - check its path"
            ) from error
        except pa.ArrowException as error:
            raise InvalidInputError(
                f"'{location}' is no location of a data server ({error}) - "
                "use grpc+unix:///PATH or grpc+tls://HOST:PORT"
            ) from error

    def put(
        self,
        table: pa.Table | pa.RecordBatchReader,
        tags: Iterable[str],
        site: str = DEFAULT_SITE,
        *,
        allow_metrics: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Fragment:
        """Store a table (or what a reader yields, batch by batch) as one fragment.

        The same table under the same tags at the same site again gives the fragment that is already there;
        ``allow_metrics`` and ``labels`` are then as the last put said.

        Args:
            labels: what is known of the place, such as ``region: north``.
        Raises:
            InvalidInputError: tags, site, labels or table cannot be stored, or exceed the server's limits.
            ConflictError: the transfer broke off.
        """
        command = encode(
            {
                "tags": sorted(check_tags(tags)),
                "site": check_site(site),
                "allow_metrics": allow_metrics,
                "labels": check_labels(labels or {}),
            }
        )
        batches = table
        if isinstance(table, pa.Table):
            rows_each = max(1, _BATCH_BYTES * table.num_rows // max(1, table.nbytes))
            batches = table.to_batches(max_chunksize=rows_each)
        descriptor = flight.FlightDescriptor.for_command(command)
        with translated(self.location):
            writer, answers = self._flight.do_put(descriptor, table.schema, self._long)
            try:
                rows = 0
                for batch in _source(batches):
                    writer.write_batch(batch)
                    rows += batch.num_rows
                writer.write_metadata(encode({"rows": rows}))
                writer.done_writing()
                answer = answers.read()
            except BaseException:
                with contextlib.suppress(flight.FlightError):
                    writer.close()
                raise
            writer.close()  # raises what the server thinks of it
        if answer is None:
            raise FailedError(f"the data server at {self.location} did not confirm a put - put again")
        return Fragment.from_json(answered(answer.to_pybytes(), self.location))

    def list(self, tags: Iterable[str] = (), site: str | None = None) -> _Fragments:
        """Fragments with any of the tags (none given: all) at a site (None: any), oldest first."""
        return self._fragments("list", {"tags": [*tags], "site": site})

    def get(self, identifier: str) -> pa.Table:
        """One fragment, with the schema metadata it was put with.

        Raises:
            NotFoundError: there is no such fragment.
        """
        return self._table({"id": fragment_id(identifier)})

    def get_matching(self, tags: Iterable[str], site: str = DEFAULT_SITE) -> pa.Table:
        """All fragments of a site with any of the tags as one table, ordered by fragment id.

        Raises:
            NotFoundError: no fragment matches.
            InvalidInputError: the matching fragments' columns differ.
        """
        return self._table({"tags": sorted(check_tags(tags)), "site": check_site(site)})

    def write_matching(self, tags: Iterable[str], site: str, fd: int) -> int:
        """Write what `get_matching` reads to an open file, as an Arrow IPC file, a few MiB at a time.

        The file is overwritten from its start; its descriptor stays open. After an error it is empty.

        Returns: the number of rows.

        Raises:
            NotFoundError, InvalidInputError: as `get_matching`.
            OSError: the file cannot be written.
        """
        ticket = {"tags": sorted(check_tags(tags)), "site": check_site(site)}
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        rows = 0
        try:
            with translated(self.location), open(fd, "wb", closefd=False) as file:
                reader = self._flight.do_get(flight.Ticket(encode(ticket)), self._long)
                with pa.ipc.new_file(file, reader.schema) as sink:
                    for chunk in reader:
                        sink.write_batch(chunk.data)
                        rows += chunk.data.num_rows
        except BaseException:
            os.ftruncate(fd, 0)  # closing the sink made a whole file out of a part
            raise
        return rows

    def drop(
        self, identifier: str | None = None, *, tags: Iterable[str] = (), site: str | None = None
    ) -> _Fragments:
        """Delete one fragment, or all with any of the tags and at the site; returns what was deleted.

        Raises:
            NotFoundError: there is no fragment of that id.
            InvalidInputError: neither id nor tags nor site were given.
        """
        if identifier is not None:
            return self._fragments("drop", {"id": fragment_id(identifier)})
        return self._fragments("drop", {"tags": [*tags], "site": site})

    def histogram(self, tags: Iterable[str], site: str, epsilon: float) -> dict[str, int]:
        """How many examples of each class a site holds under any of the tags, with noise.

        Differentially private: the data server adds the noise, see `flops.data.histograms`. The same question
        again has the same answer.

        Raises:
            InvalidInputError: an epsilon out of bounds, or data without a ClassLabel column.
            NotFoundError: no fragment matches.
            ConflictError: the data's owner did not allow metrics, or their privacy budget is spent.
        """
        request = {"tags": sorted(check_tags(tags)), "site": check_site(site), "epsilon": epsilon}
        (answer,) = self._action("histogram", request)
        return {str(name): int(count) for name, count in answer["counts"].items()}

    def ping(self) -> Stored:
        """Whether the server answers, and how much it holds."""
        (result,) = self._action("ping", {})
        return Stored(int(result["fragments"]), int(result["size_bytes"]))

    def close(self) -> None:
        self._flight.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _table(self, ticket: dict[str, Any]) -> pa.Table:
        with translated(self.location):
            return self._flight.do_get(flight.Ticket(encode(ticket)), self._long).read_all()

    def _fragments(self, action: str, request: dict[str, Any]) -> _Fragments:
        check_tags(request.get("tags", []), required=False)
        if request.get("site") is not None:
            check_site(request["site"])
        return [Fragment.from_json(result) for result in self._action(action, request)]

    def _action(self, action: str, request: dict[str, Any]) -> _Objects:
        with translated(self.location):
            results = [*self._flight.do_action(flight.Action(action, encode(request)), self._short)]
        return [answered(result.body.to_pybytes(), self.location) for result in results]


def _source(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except pa.ArrowException as error:
        raise InvalidInputError(f"the table cannot be read: {error} - mend its source") from error
