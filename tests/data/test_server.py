"""The data server as users meet it: a process behind a Unix socket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import flight

from flops.core.errors import (
    ConflictError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.data import DataClient, Stored, unix_location
from tests.data.conftest import TOKEN, RunningServer, StartServer

DEADLINE_S = 30.0


def wait_for(condition: Callable[[], Any], what: str) -> None:
    """Wait for what another process does to the file system, which sends no event."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)


@pytest.fixture
def raw(data_server: RunningServer) -> Iterator[Callable[..., Any]]:
    """Calls the server past the client's own checks; returns the error code that comes back."""
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
    client = flight.FlightClient(data_server.location)

    def code(call: Callable[[flight.FlightClient, flight.FlightCallOptions], object]) -> str:
        with pytest.raises(flight.FlightError) as caught:
            call(client, options)
        return str(json.loads(caught.value.extra_info)["code"])

    yield code
    client.close()


def raw_put(
    client: flight.FlightClient,
    options: flight.FlightCallOptions,
    command: bytes,
    batch: pa.RecordBatch,
    last: bytes | None = b'{"rows": 1}',
) -> object:
    descriptor = flight.FlightDescriptor.for_command(command)
    writer, answers = client.do_put(descriptor, batch.schema, options)
    writer.write_batch(batch)
    if last is not None:
        writer.write_metadata(last)
    writer.done_writing()
    answer = answers.read()
    writer.close()
    return answer


def test_what_is_put_comes_back_to_the_byte(data_client: DataClient, site: str) -> None:
    features = {"info": {"features": {"image": {"_type": "Image"}}}, "ü": None}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))],
        metadata={"z": "1", "huggingface": json.dumps(features), "a": b"\x00\xff"},
    )
    table = pa.Table.from_pylist([{"image": {"bytes": b"png", "path": None}}] * 3, schema=schema)
    fragment = data_client.put(table, ["mnist"], site)
    back = data_client.get(fragment.id)
    assert back.equals(table, check_metadata=True)
    assert back.schema.metadata == schema.metadata
    assert fragment.num_examples == 3
    assert fragment.columns == {"image": "struct<bytes: binary, path: string>"}
    assert not fragment.allow_metrics


def test_tags_and_sites_are_any_text(data_client: DataClient, table: pa.Table) -> None:
    site = "Krankenhaus\x00 ../../etc 🏥"
    tags = {"'; DROP TABLE", "é" * 256, "\n", "../../../tmp/x", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢"}
    fragment = data_client.put(table, tags, site)
    assert fragment.tags == tags
    assert data_client.list(["\n"], site) == [fragment]
    assert data_client.get_matching(["𝔘𝔫𝔦𝔠𝔬𝔡𝔢"], site).equals(table)
    assert data_client.drop(tags=["é" * 256], site=site) == [fragment]
    assert data_client.list([], site) == []


def test_a_hundred_long_tags_fit(data_client: DataClient, table: pa.Table, site: str) -> None:
    tags = {f"{number:03}" + "🏥" * 253 for number in range(100)}
    assert data_client.put(table, tags, site).tags == tags
    assert len(data_client.list(tags, site)) == 1


def test_equal_puts_are_one_fragment(data_client: DataClient, table: pa.Table, site: str) -> None:
    first = data_client.put(table, ["a", "b"], site)
    again = data_client.put(table.to_reader(max_chunksize=7), ["b", "a"], site)
    assert again == first
    assert data_client.list(site=site) == [first]


def test_parallel_equal_puts_are_one_fragment(data_client: DataClient, table: pa.Table, site: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        puts = list(pool.map(lambda _: data_client.put(table, ["a"], site), range(16)))
    assert len(set(puts)) == 1
    assert data_client.list(site=site) == [puts[0]]


def test_matching_fragments_are_written_as_an_arrow_file(
    data_client: DataClient, site: str, ipc_file: int
) -> None:
    metadata = {"huggingface": "{}", "b": "2", "a": "1"}
    tables = [
        pa.table({"x": [number], "y": [str(number)]}).replace_schema_metadata(metadata) for number in range(3)
    ]
    for number, table in enumerate(tables):
        data_client.put(table, [f"tag {number}", "all"], site)
    os.write(ipc_file, b"old content" * 1000)
    assert data_client.write_matching(["tag 0", "tag 2"], site, ipc_file) == 2
    written = pa.ipc.open_file(pa.BufferReader(os.pread(ipc_file, 1 << 20, 0))).read_all()
    assert sorted(written["x"].to_pylist()) == [0, 2]
    assert written.schema.equals(tables[0].schema, check_metadata=True)
    assert written.equals(data_client.get_matching(["tag 0", "tag 2"], site))
    assert data_client.write_matching(["all"], site, ipc_file) == 3


def test_no_match_says_what_to_do(data_client: DataClient, ipc_file: int) -> None:
    with pytest.raises(NotFoundError) as caught:
        data_client.write_matching(["b", "a"], "x", ipc_file)
    assert str(caught.value) == (
        "no fragment at site 'x' carries any of the tags 'a', 'b' - "
        "see 'flops data ls', or put data with 'flops data put FILE --tag a'"
    )
    assert isinstance(caught.value.__cause__, flight.FlightError)
    assert os.fstat(ipc_file).st_size == 0


def test_fragments_whose_columns_differ_name_them(data_client: DataClient, site: str, ipc_file: int) -> None:
    data_client.put(pa.table({"x": [1], "label": [1]}), ["t"], site)
    data_client.put(pa.table({"x": [1], "label": ["one"]}), ["t"], site)
    with pytest.raises(InvalidInputError, match=r"column 'label' is .* and .* in f-"):
        data_client.write_matching(["t"], site, ipc_file)


def test_an_error_in_the_source_is_the_callers_and_stores_nothing(
    data_client: DataClient, site: str, table: pa.Table
) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield from table.to_batches()
        raise pa.ArrowInvalid("row 101 has 3 columns")

    reader = pa.RecordBatchReader.from_batches(table.schema, batches())
    with pytest.raises(InvalidInputError, match="row 101 has 3 columns"):
        data_client.put(reader, ["t"], site)
    assert data_client.list(site=site) == []


def test_drop_and_get_of_nothing_are_named(data_client: DataClient) -> None:
    missing = "f-" + "0" * 32
    for call in (data_client.get, data_client.drop):
        with pytest.raises(NotFoundError, match=f"there is no fragment {missing} - see 'flops"):
            call(missing)
    with pytest.raises(InvalidInputError, match="nothing says which fragments to drop"):
        data_client.drop()


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", "Bearer " + TOKEN])
def test_every_call_needs_the_token(
    data_server: RunningServer, token: str, table: pa.Table, site: str
) -> None:
    with DataClient(data_server.location, token) as client:
        calls: list[Callable[[], object]] = [
            client.ping,
            client.list,
            lambda: client.put(table, ["t"], site),
            lambda: client.get("f-" + "0" * 32),
            lambda: client.drop(site=site),
        ]
        for call in calls:
            with pytest.raises(UnauthorizedError, match="the data server refused the token"):
                call()


def test_the_socket_is_private(data_server: RunningServer) -> None:
    assert (data_server.home / "run").stat().st_mode & 0o777 == 0o700
    for path in data_server.root.rglob("*"):
        assert not path.stat().st_mode & 0o077, path


@pytest.mark.parametrize(
    "command",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"tags": ["t"], "site": "s", "path": "/etc"}',
        b'{"tags": "t"}',
        b'{"tags": []}',
        b'{"tags": [1]}',
        b'{"tags": ["\\ud800"]}',
        b'{"tags": {"t": 1}, "site": ["s"]}',
        b'{"tags": ["t"], "site": ""}',
        b'{"tags": ["t"], "allow_metrics": "no"}',
        b'{"tags": ["t"], "labels": ["no"]}',
        b'{"tags": ["' + b"a" * (2 << 20) + b'"]}',
    ],
    ids=lambda command: command[:30].decode(errors="replace"),
)
def test_hostile_requests_are_refused(raw: Callable[..., str], command: bytes) -> None:
    batch = pa.record_batch({"a": [1]})
    assert raw(lambda client, o: raw_put(client, o, command, batch)) == "invalid-input"
    assert raw(lambda client, o: client.do_get(flight.Ticket(command), o)) in (
        "invalid-input",
        "not-found",
    )
    drop = flight.Action("drop", command)
    assert raw(lambda client, o: list(client.do_action(drop, o))) == "invalid-input"


@pytest.mark.parametrize("identifier", ["../../secret", "/etc/passwd", "", None, 7, ["x"], "f-" * 9])
def test_ids_never_become_paths(raw: Callable[..., str], identifier: object) -> None:
    request = json.dumps({"id": identifier}).encode()
    assert raw(lambda client, o: client.do_get(flight.Ticket(request), o)) == "invalid-input"
    drop = flight.Action("drop", request)
    assert raw(lambda client, o: list(client.do_action(drop, o))) == "invalid-input"


@pytest.mark.parametrize(
    ("last", "code"),
    [
        (None, "conflict"),
        (b'{"rows": 2}', "conflict"),
        (b'{"rows": "1"}', "invalid-input"),
        (b"{}", "invalid-input"),
        (b"x", "invalid-input"),
    ],
)
def test_a_put_without_its_right_end_is_not_stored(
    raw: Callable[..., str], data_client: DataClient, site: str, last: bytes | None, code: str
) -> None:
    command = json.dumps({"tags": ["t"], "site": site}).encode()
    batch = pa.record_batch({"a": [1]})
    assert raw(lambda client, o: raw_put(client, o, command, batch, last)) == code
    assert data_client.list(site=site) == []


def test_offsets_that_point_outside_are_refused(raw: Callable[..., str], site: str) -> None:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1 << 30, 3)))
    bad = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))
    batch = pa.RecordBatch.from_arrays([bad], names=["a"])
    command = json.dumps({"tags": ["t"], "site": site}).encode()
    assert raw(lambda c, o: raw_put(c, o, command, batch, b'{"rows": 2}')) == "invalid-input"


def test_unknown_actions_are_refused(raw: Callable[..., str]) -> None:
    action = flight.Action("format-disk", b"{}")
    assert raw(lambda client, o: list(client.do_action(action, o))) == "invalid-input"


def test_too_much_data_is_refused_with_the_servers_words(
    start_data_server: StartServer,
) -> None:
    server = start_data_server("--max-fragment-bytes", "1000000")
    table = pa.table({"a": pa.array(memoryview(bytes(80_000_000)).cast("q"))})
    with DataClient(server.location, TOKEN) as client:
        with pytest.raises(InvalidInputError, match="the table has more than 1000000 bytes - put"):
            client.put(table, ["t"])
        assert client.ping() == Stored(0, 0)
    assert server.incoming == []


def test_a_full_disk_is_named(start_data_server: StartServer, table: pa.Table) -> None:
    server = start_data_server("--reserve-bytes", str(1 << 60))
    with (
        DataClient(server.location, TOKEN) as client,
        pytest.raises(UnavailableError, match=r"the data server's disk has .* make room"),
    ):
        client.put(table, ["t"])


def open_put(server: RunningServer, began: threading.Event, end: threading.Event) -> FlopsError | None:
    """A put that stands still in the middle until ``end`` is set; returns what became of it."""
    batch = pa.record_batch({"a": list(range(70_000))})

    def batches() -> Iterator[pa.RecordBatch]:
        for _ in range(4):
            yield batch
        began.set()
        end.wait(DEADLINE_S)
        yield batch

    reader = pa.RecordBatchReader.from_batches(batch.schema, batches())
    with DataClient(server.location, TOKEN) as client:
        try:
            client.put(reader, ["half"])
        except FlopsError as error:
            return error
    return None


def test_a_server_killed_in_the_middle_of_a_put_has_nothing_half_written(
    start_data_server: StartServer, table: pa.Table
) -> None:
    server = start_data_server()
    began, end = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        with DataClient(server.location, TOKEN) as client:
            whole = client.put(table, ["whole"])
        put = pool.submit(open_put, server, began, end)
        assert began.wait(DEADLINE_S)
        wait_for(lambda: any(f.stat().st_size > 4 for f in server.incoming), "a row group on disk")
        server.kill()
        end.set()
        assert isinstance(put.result(DEADLINE_S), UnavailableError)
    assert server.incoming
    again = start_data_server(home=server.home)
    assert again.incoming == []
    with DataClient(again.location, TOKEN) as client:
        assert client.list() == [whole]
        assert client.get(whole.id).equals(table)
        assert client.list(["half"]) == []


def test_a_client_killed_in_the_middle_of_a_put_leaves_nothing(
    start_data_server: StartServer,
) -> None:
    server = start_data_server()
    program = (
        "import sys, pyarrow as pa\n"
        "from flops.data import DataClient\n"
        "batch = pa.record_batch({'a': list(range(70_000))})\n"
        "def batches():\n"
        "    yield batch\n"
        "    print('half', flush=True)\n"
        "    sys.stdin.read()\n"
        "reader = pa.RecordBatchReader.from_batches(batch.schema, batches())\n"
        "DataClient(sys.argv[1], sys.argv[2]).put(reader, ['t'])\n"
    )
    command = [sys.executable, "-c", program, server.location, TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        wait_for(lambda: server.incoming, "the put to begin")
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    wait_for(lambda: not server.incoming, "the server to give the put up")
    with DataClient(server.location, TOKEN) as client:
        assert client.list() == []


def test_a_stopped_server_ends_in_time_though_a_put_stands_still(
    start_data_server: StartServer,
) -> None:
    server = start_data_server()
    began, end = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(open_put, server, began, end)
        assert began.wait(DEADLINE_S)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 5
        end.set()
        assert isinstance(put.result(DEADLINE_S), UnavailableError | ConflictError)
    assert not (server.home / "run" / "data.sock").exists()
    assert not (server.home / "ready").exists()


def test_a_client_outlives_its_server(start_data_server: StartServer, table: pa.Table) -> None:
    server = start_data_server()
    with DataClient(server.location, TOKEN) as client:
        fragment = client.put(table, ["t"])
        server.kill()
        with pytest.raises(UnavailableError, match=r"no data server answers at grpc.unix:.* 'flops up'"):
            client.ping()
        start_data_server(home=server.home)
        end = time.monotonic() + DEADLINE_S
        while True:  # gRPC's own back-off decides when it tries again
            try:
                assert client.list() == [fragment]
                break
            except UnavailableError:
                assert time.monotonic() < end


def test_no_server_is_named(tmp_path: Path) -> None:
    location = unix_location(tmp_path / "none.sock")
    with (
        DataClient(location, TOKEN) as client,
        pytest.raises(
            UnavailableError, match=r"no data server answers at grpc\+unix:.*/none.sock - start it"
        ),
    ):
        client.ping()


@pytest.mark.slow
def test_forty_readers_do_not_need_forty_times_the_memory(start_data_server: StartServer) -> None:
    server = start_data_server()
    with DataClient(server.location, TOKEN) as client:
        size = 128 << 20
        fragment = client.put(pa.table({"a": pa.array(memoryview(os.urandom(size)).cast("q"))}), ["t"])
        before = psutil.Process(server.process.pid).memory_info().rss
        options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {TOKEN}".encode())])
        readers = []
        for _ in range(40):
            connection = flight.FlightClient(server.location)
            ticket = flight.Ticket(json.dumps({"id": fragment.id}).encode())
            readers.append((connection, connection.do_get(ticket, options)))
        for _, reader in readers:
            assert reader.read_chunk().data.num_rows
        grown = psutil.Process(server.process.pid).memory_info().rss - before
        for connection, reader in readers:
            reader.cancel()
            connection.close()
        # the file itself is mapped once by all of them
        assert grown < size + 40 * (16 << 20)
        assert client.get(fragment.id).num_rows == size // 8
