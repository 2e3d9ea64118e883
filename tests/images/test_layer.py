"""Layers: the same bytes from the same files, in a form that engines unpack; made once."""

import gzip
import hashlib
import io
import os
import random
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from flops.core.errors import FailedError, InvalidInputError
from flops.images.descriptor import OCI_LAYER_GZIP, OCI_LAYER_ZSTD
from flops.images.layer import MTIME, Compression, Entry, Layer, tree, write_layer
from flops.images.layer_cache import LayerCache
from flops.images.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "images")


def unpacked(layout: Layout, layer: Layer) -> bytes:
    content = layout.path(layer.descriptor.digest).read_bytes()
    if layer.descriptor.media_type == OCI_LAYER_ZSTD:
        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return gzip.decompress(content)


def members(layout: Layout, layer: Layer) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(unpacked(layout, layer))) as tar:
        return tar.getmembers()


def large(folder: Path) -> list[Entry]:
    """Several blocks of a few kinds of content."""
    dice = random.Random(3)
    (folder / "random").write_bytes(dice.randbytes(3_000_001))
    (folder / "text").write_bytes(b"FLOps " * 700_000)
    return [Entry.copy("/a/random", folder / "random"), Entry.copy("/a/text", folder / "text")]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_bytes_do_not_depend_on_threads_or_order(
    layout: Layout, tmp_path: Path, compression: Compression
) -> None:
    entries = large(tmp_path)
    first = write_layer(layout, "x", entries, compression, threads=1)
    for threads in (2, 3):
        assert write_layer(layout, "x", reversed(entries), compression, threads=threads) == first
    content = unpacked(layout, first)
    assert first.descriptor.media_type == (OCI_LAYER_GZIP if compression == "gzip" else OCI_LAYER_ZSTD)
    assert (first.diff_id, first.size_bytes) == (
        "sha256:" + hashlib.sha256(content).hexdigest(),
        len(content),
    )
    assert first.compressed_bytes == layout.path(first.descriptor.digest).stat().st_size


def test_times_owners_and_machines_leave_no_trace(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    first = write_layer(layout, "x", [Entry.copy("/x", path)])
    os.utime(path, (1, 1))
    path.chmod(0o600)
    assert write_layer(layout, "x", [Entry.copy("/x", path)]) == first


def test_members_are_sorted_below_folders_that_nobody_mentioned(layout: Layout) -> None:
    entries = [
        Entry.file("/b/c/d", b"1", mode=0o755),
        Entry.file("/b-x", b""),
        Entry.link("/b/python", "/usr/bin/python3"),
        Entry.folder("/b/private", mode=0o700, owner=10001),
    ]
    found = members(layout, write_layer(layout, "x", entries))
    assert [(m.name, oct(m.mode), m.uid, m.gid, m.mtime) for m in found] == [
        ("b", "0o755", 0, 0, MTIME),
        ("b/c", "0o755", 0, 0, MTIME),
        ("b/c/d", "0o755", 0, 0, MTIME),
        ("b/private", "0o700", 10001, 10001, MTIME),
        ("b/python", "0o777", 0, 0, MTIME),
        ("b-x", "0o644", 0, 0, MTIME),
    ]
    assert found[4].issym()
    assert found[4].linkname == "/usr/bin/python3"


def test_equal_files_are_stored_once(layout: Layout, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(b"x" * 9000)
    (tmp_path / "three").chmod(0o755)
    found = members(
        layout, write_layer(layout, "x", [Entry.copy(f"/{n}", tmp_path / n) for n in ("one", "two", "three")])
    )
    assert [(m.name, m.islnk(), m.linkname) for m in found] == [
        ("one", False, ""),
        ("three", False, ""),
        ("two", True, "one"),
    ], "of files with other modes there are two"


def test_long_and_odd_names_survive(layout: Layout) -> None:
    names = ["/" + "x" * 120 + "/" + "y" * 200, "/é/日本", "/with space\n", os.fsdecode(b"/not-utf8-\xff")]
    found = members(layout, write_layer(layout, "x", [Entry.file(name, b"1") for name in names]))
    assert {f"/{member.name}" for member in found if member.isfile()} == set(names)


@pytest.mark.parametrize(
    "path", ["", "relative", "/", "/a/../b", "/a//b", "/a/.", "/a/.wh.x", "/.wh..wh..opq", "/a\0b"]
)
def test_impossible_paths(path: str) -> None:
    with pytest.raises(InvalidInputError):
        Entry.file(path, b"")


@pytest.mark.parametrize(
    "entries",
    [
        [Entry.file("/a", b"1"), Entry.file("/a", b"1")],
        [Entry.folder("/a"), Entry.link("/a", "b")],
        [Entry.file("/a", b"1"), Entry.file("/a/b", b"1")],
        [Entry.link("/a", "/etc"), Entry.file("/a/b/c", b"1")],
    ],
)
def test_entries_that_exclude_each_other(layout: Layout, entries: list[Entry]) -> None:
    with pytest.raises(InvalidInputError):
        write_layer(layout, "x", entries)


@pytest.mark.parametrize("content", [b"", b"longer than before"])
def test_file_that_changes_on_the_way_is_said_and_leaves_nothing(
    layout: Layout, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    entry = Entry.copy("/file", path)
    path.write_bytes(content)
    with pytest.raises(FailedError, match="changed while it was packed"):
        write_layer(layout, "x", [entry])
    assert [found for found in layout.folder.rglob("*") if found.is_file()] == [layout.folder / "oci-layout"]


def test_tree_keeps_links_and_follows_none(layout: Layout, tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / ".git").mkdir(parents=True)
    (code / ".git" / "config").write_text("x")
    (code / "run.sh").write_text("x")
    (code / "run.sh").chmod(0o700)
    (code / "host").symlink_to("/etc/hostname")
    (code / "all").symlink_to("/etc")
    found = members(layout, write_layer(layout, "code", tree(code, "/code", skip={".git"}.__contains__)))
    assert [(m.name, m.linkname, oct(m.mode)) for m in found] == [
        ("code", "", "0o755"),
        ("code/all", "/etc", "0o777"),
        ("code/host", "/etc/hostname", "0o777"),
        ("code/run.sh", "", "0o755"),
    ]


def test_tree_with_a_pipe_in_it_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="neither file nor folder nor link"):
        list(tree(tmp_path, "/code"))


def test_a_layer_is_made_once_whoever_asks(layout: Layout, tmp_path: Path) -> None:
    made = []

    def make() -> Layer:
        made.append(threading.get_ident())
        return write_layer(layout, "x", [Entry.file("/x", b"1")], packages=["a==1", "b==2"])

    def ask(_: int) -> Layer:
        return LayerCache(tmp_path / "layers", layout).layer("x", {"lock": "1"}, make)

    with ThreadPoolExecutor(4) as pool:
        layers = list(pool.map(ask, range(8)))
    assert len(made) == 1
    assert all(layer == layers[0] for layer in layers)
    assert layers[-1].packages == ("a==1", "b==2")


def test_a_layer_whose_blob_or_note_is_gone_is_made_again(layout: Layout, tmp_path: Path) -> None:
    cache = LayerCache(tmp_path / "layers", layout)
    made: list[int] = []

    def make() -> Layer:
        made.append(1)
        return write_layer(layout, "x", [Entry.file("/x", b"1")])

    first = cache.layer("x", {"lock": "1"}, make)
    layout.path(first.descriptor.digest).unlink()
    assert cache.layer("x", {"lock": "1"}, make) == first
    for note in (tmp_path / "layers").glob("*.json"):
        note.write_text("{")
    assert cache.layer("x", {"lock": "1"}, make) == first
    assert len(made) == 3


def test_an_error_among_the_entries_ends_the_layer(layout: Layout) -> None:
    def entries() -> Iterator[Entry]:
        yield Entry.file("/x", b"1")
        raise FailedError("stopped on request")

    with pytest.raises(FailedError, match="stopped on request"):
        write_layer(layout, "x", entries())
