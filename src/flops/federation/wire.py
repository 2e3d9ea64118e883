"""What aggregator and learners say to each other, over one persistent Arrow Flight exchange a learner.

A message is a JSON header (the Flight message's application metadata) and, where it carries parameters, one
record batch with a single uint8 column: a slice of the flat body that `flops_worker.tensors.Layout`
describes. Arrays are never copied to be sent, and nothing that arrives is executed: a header is bounded,
parsed as JSON, and checked where it is used.

    learner                                       aggregator
    hello(learner)                           ->
                                             <-   welcome(project, layout)
    ready(allows_metrics)                    ->
                                             <-   train(task, round, version, model, config, seed,
                                                       request)
                                                       [+ body | body...]
    result(task, version, num_examples, ...) [+ body] ->
                                             <-   send(task)          only where the body did not fit in
    body(offset)...                          ->
                                             <-   evaluate(task, round, model) [+ body | body...]
    evaluated(task, loss, accuracy, ...)     ->
    declined(task, reason)                   ->                  not this time (clusters)
    unready(reason)                          ->                  until it says ready again (clusters)
    failed(where, message)                   ->                  the user's code ended this learner's part
                                             <-   refused(task, reason) | stop(reason)
    beat()                                   ->                  now and then: the connection is in use

The aggregator asks for each large update when it has room for it (``send``): memory is bounded by what it
asks for, and an update that is refused by its announcement costs no bytes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from flops.federation.blocks import Block

SCHEMA = pa.schema([pa.field("body", pa.uint8(), nullable=False)])
INLINE_BYTES = 64 << 10
"""Bodies up to this size travel beside the header of their message."""
MAX_HEADER_BYTES = 16 << 20
MAX_ANSWER_BYTES = 1 << 20
"""What a learner's header may have, beyond twice what the description of the model itself needs."""


_MAX_DEPTH = 16


class WireError(ValueError):
    """The other end does not keep to the protocol."""


class Writer(Protocol):
    """The sending half of a Flight exchange, on either end."""

    def write_metadata(self, metadata: bytes) -> None: ...
    def write_with_metadata(self, batch: Any, metadata: bytes) -> None: ...


class Reader(Protocol):
    """The receiving half of a Flight exchange, on either end."""

    def read_chunk(self) -> Any: ...


@dataclass(frozen=True)
class Received:
    """One message: its header, and the bytes beside it, if any (zero-copy, valid as long as it is held)."""

    header: dict[str, Any]
    body: memoryview | None
    size_bytes: int = 0
    """Of both, as they came."""

    @property
    def kind(self) -> str:
        return str(self.header.get("t", ""))


def send(writer: Writer, header: dict[str, Any], body: memoryview | bytes | None = None) -> int:
    """Send a message; returns how many bytes it has."""
    metadata = json.dumps(header, separators=(",", ":")).encode()
    if body is None:
        writer.write_metadata(metadata)
    else:
        writer.write_with_metadata(_batch(body), metadata)
    return len(metadata) + (len(body) if body is not None else 0)


def send_body(writer: Writer, task: str, blocks: Iterable[Block], body: memoryview) -> None:
    """Send a flat body block by block; each says where it belongs."""
    for block in blocks:
        send(writer, {"t": "body", "task": task, "offset": block.offset}, body[block.offset : block.end])


def receive(reader: Reader, max_header_bytes: int = MAX_HEADER_BYTES) -> Received:
    """Wait for the next message.

    Raises:
        StopIteration: the other end closed the exchange in order.
        WireError: a message that does not belong to this protocol.
        pyarrow.flight.FlightError: the connection is gone.
    """
    try:
        chunk = reader.read_chunk()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise WireError(f"a message is not Arrow data: {str(error)[:200]}") from error
    return parse(chunk.app_metadata, chunk.data, max_header_bytes)


def parse(metadata: Any, batch: Any, max_header_bytes: int = MAX_HEADER_BYTES) -> Received:
    """Read a message that may hold anything: a buffer and a record batch, or None where there is none.

    Raises:
        WireError: it does not belong to this protocol.
    """
    if metadata is None or metadata.size > max_header_bytes:
        raise WireError("a message came without a header, or with one that is too large")
    try:
        header = json.loads(metadata.to_pybytes())
    except (ValueError, RecursionError) as error:
        raise WireError("a header is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("a header is not a JSON object")
    if _is_deep(header):
        raise WireError("a header is nested too deeply")
    body = None
    if batch is not None:
        if not batch.schema.equals(SCHEMA):
            raise WireError("a body is not one column of bytes")
        column = batch.column(0)
        buffer = column.buffers()[1]
        body = memoryview(buffer)[column.offset : column.offset + len(column)] if buffer is not None else None
    return Received(header, body, metadata.size + (len(body) if body is not None else 0))


def _is_deep(header: dict[str, Any]) -> bool:
    """Whether a header is nested deeper than any of ours: what parses in one thread may be too deep to print
    in another, which has more on its stack."""
    level: list[Any] = [header]
    for _ in range(_MAX_DEPTH):
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [item for values in inner for item in values if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _batch(body: memoryview | bytes) -> Any:
    array = pa.UInt8Array.from_buffers(pa.uint8(), len(body), [None, pa.py_buffer(body)])
    return pa.RecordBatch.from_arrays([array], schema=SCHEMA)
