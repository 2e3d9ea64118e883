"""The data server: ``python -m flops.data.server --root DIR --socket PATH --token-file FILE``, or, in a
container, ``--config FILE`` (`DataServerConfig`).

Serves one `FragmentStore` over Arrow Flight on a Unix socket, a network location (TLS), or both. When it
listens it writes ``{"pid", "locations"}`` to its standard output and to ``--ready-file``. It ends on
SIGTERM or SIGINT within two seconds, whatever clients are doing: every put is whole or absent.
"""

import argparse
import functools
import hmac
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
from pyarrow import flight

from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    UnauthorizedError,
)
from flops.data.config import DataServerConfig
from flops.data.fragments import DEFAULT_SITE, check_labels, check_site, check_tags
from flops.data.histograms import Histograms
from flops.data.listening import TlsFiles, check_listen, prepare_socket
from flops.data.protocol import as_flight_error, decode, encode, read_token
from flops.data.store import FragmentStore
from flops.data.writing import FragmentWriter, Limits
from flops.telemetry import log_lines

_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)
_GRACE_S = 2.0


class BearerToken(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses every call that does not carry the token, before any of its data is read."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: flight.CallInfo, headers: dict[str, list[str]]) -> None:
        given = headers.get("authorization", [])
        # One header exactly: with two, what is checked here and what others log could differ.
        text = given[0] if len(given) == 1 else ""
        encoded = text.encode(errors="replace") if isinstance(text, str) else bytes(text)
        if not hmac.compare_digest(encoded, self._expected):
            raise as_flight_error(
                UnauthorizedError("the data server refused the token - check the token file")
            )


def _answering(
    method: Callable[Concatenate["DataServer", _P], _R],
) -> Callable[Concatenate["DataServer", _P], _R]:
    """Turn what a handler raises into a Flight error.

    The unexpected is logged here and kept from the client.
    """

    def handler(self: "DataServer", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            raise _outward(error) from error

    return handler


def _outward(error: Exception) -> Any:
    if isinstance(error, flight.FlightError):
        return error
    if isinstance(error, FlopsError):
        return as_flight_error(error)
    _log.error("a call failed", exc_info=error)
    return as_flight_error(FailedError("the data server failed - look at its log"))


class DataServer(flight.FlightServerBase):  # type: ignore[misc]
    """One listening location of a store. It serves from its construction until `shutdown`."""

    def __init__(
        self,
        store: FragmentStore,
        histograms: Histograms,
        token: str,
        location: str,
        tls: TlsFiles | None = None,
    ) -> None:
        """Begin to serve.

        Raises:
            ConflictError: it cannot listen there.
        """
        self._store = store
        self._histograms = histograms
        try:
            super().__init__(
                location,
                middleware={"token": BearerToken(token)},
                **(tls.options() if tls else {}),
            )
        except (OSError, pa.ArrowException) as error:
            raise ConflictError(
                f"the data server cannot listen on '{location}': {error} - use another location, "
                "and check certificate and key"
            ) from error

    @_answering
    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        request = decode(descriptor.command or b"", frozenset({"tags", "site", "allow_metrics", "labels"}))
        allow_metrics = request.get("allow_metrics", False)
        if not isinstance(allow_metrics, bool):
            raise InvalidInputError("allow_metrics is not true or false - change the request")
        fragment = self._store.put(
            reader.schema,
            functools.partial(_receive, reader),
            tags=check_tags(request.get("tags")),
            site=check_site(request.get("site", DEFAULT_SITE)),
            allow_metrics=allow_metrics,
            labels=check_labels(request.get("labels", {})),
        )
        writer.write(encode(fragment.to_json()))

    @_answering
    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        request = decode(ticket.ticket, frozenset({"id", "tags", "site"}))
        if "id" in request:
            schema, batches = self._store.read(request["id"])
        else:
            tags = check_tags(request.get("tags"))
            schema, batches = self._store.read_matching(tags, request.get("site", DEFAULT_SITE))
        return flight.GeneratorStream(schema, _guarded(batches))

    @_answering
    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[flight.Result]:
        body = action.body.to_pybytes() if action.body else b""
        if action.type == "ping":
            fragments = self._store.list()
            size = sum(fragment.size_bytes for fragment in fragments)
            return [flight.Result(encode({"fragments": len(fragments), "size_bytes": size}))]
        if action.type == "histogram":
            question = decode(body, frozenset({"tags", "site", "epsilon"}))
            counts = self._histograms.ask(question.get("tags"), question.get("site"), question.get("epsilon"))
            return [flight.Result(encode({"counts": counts}))]
        if action.type not in ("list", "drop"):
            raise InvalidInputError("this action is unknown - the actions are list, drop, histogram and ping")
        request = decode(body, frozenset({"id", "tags", "site"}))
        tags = check_tags(request.get("tags") or [], required=False)
        site = request.get("site")
        site = None if site is None else check_site(site)
        if action.type == "list":
            found = self._store.list(tags, site)
        else:
            found = self._store.drop(request.get("id"), tags=tags, site=site)
        return [flight.Result(encode(fragment.to_json())) for fragment in found]

    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return [
            ("list", "fragments by tags and site"),
            ("drop", "delete fragments by id, or by tags and site"),
            ("histogram", "counts of a site's labels, with noise"),
            ("ping", "how much is stored"),
        ]


def _receive(reader: flight.MetadataRecordBatchReader, writer: FragmentWriter) -> None:
    """Write every batch of a put, and insist on its last message."""
    declared: int | None = None
    rows = 0
    while declared is None:
        try:
            chunk = reader.read_chunk()
        except StopIteration as error:
            raise ConflictError("the put broke off before its end - put again") from error
        if chunk.app_metadata is not None:
            last = decode(chunk.app_metadata.to_pybytes(), frozenset({"rows"}))
            if not isinstance(last.get("rows"), int):
                raise InvalidInputError("a put ends without its number of rows - put again")
            declared = last["rows"]
        if chunk.data is not None:
            writer.write(chunk.data)
            rows += chunk.data.num_rows
    if declared != rows:
        raise ConflictError(f"{rows} of {declared} rows of the put arrived - put again")


def _guarded(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except Exception as error:
        raise _outward(error) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a data server until a signal ends it; returns the exit code."""
    log_lines("data")
    # Not blocked and waited for: threads of libraries, which are there already, would take them, and in the
    # first process of a container they would be lost there.
    told, telling = socket.socketpair()
    telling.setblocking(False)
    signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.umask(0o077)
    try:
        config = _config(arguments)
        store, servers, locations = _start(config)
    except FlopsError as error:
        print(f"flops data server: {error}", file=sys.stderr)  # noqa: T201
        return 2
    ready = json.dumps({"pid": os.getpid(), "locations": locations})
    if config.ready_file:
        _write_whole(Path(config.ready_file), ready)
    print(ready, flush=True)  # noqa: T201
    _log.info("%d fragments below '%s'", len(store.list()), config.root)
    received = signal.Signals(told.recv(1)[0])
    _log.info("ends on %s", received.name)
    # Flight's shutdown waits for open calls; a client that stands still must not keep the server alive.
    stoppers = [threading.Thread(target=server.shutdown, daemon=True) for server in servers]
    for stopper in stoppers:
        stopper.start()
    for stopper in stoppers:
        stopper.join(_GRACE_S / len(stoppers))
    for left in (config.socket, config.ready_file):
        if left:
            Path(left).unlink(missing_ok=True)
    if any(stopper.is_alive() for stopper in stoppers):
        sys.stdout.flush()
        os._exit(0)
    store.close()
    return 0


def _start(config: DataServerConfig) -> tuple[FragmentStore, list[DataServer], list[str]]:
    tls = None
    if config.tls_cert and config.tls_key:
        authority = Path(config.tls_ca) if config.tls_ca else None
        tls = TlsFiles(Path(config.tls_cert), Path(config.tls_key), authority)
    unix = prepare_socket(Path(config.socket)) if config.socket else None
    network = check_listen(config.listen) if config.listen else None
    root = Path(config.root)
    limits = Limits(max_fragment_bytes=config.max_fragment_bytes, reserve_bytes=config.reserve_bytes)
    store = FragmentStore(root, limits)
    histograms = Histograms(store, root / "histograms.json", config.privacy_budget)
    servers: list[DataServer] = []
    locations: list[str] = []
    if unix:
        servers.append(DataServer(store, histograms, config.token, unix))
        locations.append(unix)
    if config.listen and network:
        given = tls if config.encrypted else None
        server = DataServer(store, histograms, config.token, config.listen, given)
        servers.append(server)
        host = f"[{network[0]}]" if ":" in network[0] else network[0]
        locations.append(f"{'grpc+tls' if config.encrypted else 'grpc'}://{host}:{server.port}")
    return store, servers, locations


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _config(arguments: Sequence[str] | None) -> DataServerConfig:
    """What the command line says, or the file that it names."""
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "config" in given:
        if len(given) > 1:
            parser.error("--config stands alone")
        return DataServerConfig.read(given["config"])
    if "root" not in given or "token_file" not in given:
        parser.error("--config, or --root and --token-file, are required")
    return DataServerConfig(token=read_token(given.pop("token_file")), **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flops.data.server", description=__doc__)

    def add(flag: str, kind: Callable[[str], Any], text: str) -> None:
        parser.add_argument(flag, type=kind, help=text)

    add("--config", Path, "private file that says all of this, and the token itself")
    add("--root", str, "folder of the fragments")
    add("--token-file", Path, "file of mode 600 with the token of all callers")
    add("--socket", str, "Unix socket to listen on; its folder must be private")
    add("--listen", str, "grpc+tls://HOST:PORT (plain grpc:// on loopback only)")
    add("--tls-cert", str, "PEM certificate chain of --listen")
    add("--tls-key", str, "PEM private key of --listen")
    add("--tls-ca", str, "PEM certificate of the authority that callers of --listen must be certified by")
    add("--ready-file", str, "written when the server listens, removed when it ends")
    add("--max-fragment-bytes", int, "of decoded data")
    add("--reserve-bytes", int, "disk space to leave free")
    add("--privacy-budget", float, "epsilon that all histograms of a fragment's labels may cost together")
    return parser


if __name__ == "__main__":
    sys.exit(main())
