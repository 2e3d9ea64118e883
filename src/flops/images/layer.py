"""Layers: files packed, hashed and compressed in one pass, the same bytes from the same files.

A layer goes straight into a layout, piece by piece; none is ever held in memory. Names are sorted, times are
one constant, owners are what the caller says, modes are 644 or 755: nothing of this machine gets in. Files
with equal content are stored once and linked.

The uncompressed digest (diff id) is the same everywhere. The compressed one is the same for the same version
of the compressor on the same kind of processor, with any number of threads.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast

import zstandard
from isal import igzip_threaded

from flops.core.errors import FailedError, InvalidInputError
from flops.images.descriptor import OCI_LAYER_GZIP, OCI_LAYER_ZSTD, Descriptor
from flops.images.layout import Layout, Writer

Compression = Literal["gzip", "zstd"]
MEDIA_TYPES = {"gzip": OCI_LAYER_GZIP, "zstd": OCI_LAYER_ZSTD}

KIND = "io.flops.layer"
"""Annotation of a layer: what it is, for people and for who builds on it."""
DIFF_ID = "io.flops.diff-id"
"""Annotation of a layer: digest of its uncompressed form."""
SIZE = "io.flops.size"
"""Annotation of a layer: bytes of its uncompressed form."""
PACKAGES = "io.flops.packages"
"""Annotation of a layer: the pins of the packages in it, with spaces between."""

# 2 January 1980: the first day that ZIP files can hold in every time zone; with 0, code that zips itself
# (Spark, SageMaker, torch.package) fails.
MTIME = 315_619_200

_BLOCK = 1 << 20
_LEVEL = {"gzip": 2, "zstd": 3}
_RECORD = tarfile.RECORDSIZE
_LINKED_FROM = 4096
"""Smaller files with equal content are not worth a look."""


@dataclass(frozen=True)
class Entry:
    """One file, folder or link of a layer."""

    path: str
    """Absolute, in the image."""
    kind: Literal["file", "folder", "link"]
    mode: int
    owner: int = 0
    """Number of user and group."""
    source: Path | None = None
    """A file's content: here, or in ``content``."""
    size: int = 0
    """Bytes of the content."""
    content: bytes = field(default=b"", repr=False)
    target: str = ""
    """Where a symbolic link leads to."""

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if parts[0] or len(parts) < 2 or any(part in ("", ".", "..") for part in parts[1:]):
            raise InvalidInputError(
                f"'{self.path[:200]}' is not a path in an image - write it like /code/x.py"
            )
        if "\0" in self.path or parts[-1].startswith(".wh."):
            raise InvalidInputError(f"'{self.path[:200]!r}' cannot be a file of an image - rename it")

    @classmethod
    def file(cls, path: str, content: bytes, mode: int = 0o644, owner: int = 0) -> "Entry":
        return cls(path, "file", mode, owner, None, len(content), content)

    @classmethod
    def copy(cls, path: str, source: Path, mode: int | None = None, owner: int = 0) -> "Entry":
        """A file with the content of one of this machine; ``mode`` None: as executable as that."""
        status = source.stat()
        if mode is None:
            mode = 0o755 if status.st_mode & 0o100 else 0o644
        return cls(path, "file", mode, owner, source, status.st_size)

    @classmethod
    def folder(cls, path: str, mode: int = 0o755, owner: int = 0) -> "Entry":
        return cls(path, "folder", mode, owner)

    @classmethod
    def link(cls, path: str, target: str) -> "Entry":
        return cls(path, "link", 0o777, target=target)


@dataclass(frozen=True)
class Layer:
    """A layer in a layout."""

    what: str
    """Such as ``dependencies``."""
    descriptor: Descriptor
    diff_id: str
    """Digest of its uncompressed form."""
    size_bytes: int | None
    """Of its uncompressed form; None: not known."""

    @property
    def compressed_bytes(self) -> int:
        return self.descriptor.size

    @property
    def packages(self) -> tuple[str, ...]:
        """The pins of the packages in it."""
        return tuple(self.descriptor.annotations.get(PACKAGES, "").split())

    @classmethod
    def of(cls, descriptor: Descriptor, diff_id: str) -> "Layer":
        """A layer that a manifest names; one that does not say what it is belongs to a base."""
        size = descriptor.annotations.get(SIZE, "")
        what = descriptor.annotations.get(KIND, "base")
        return cls(what, descriptor, diff_id, int(size) if size.isdecimal() else None)


def write_layer(
    layout: Layout,
    what: str,
    entries: Iterable[Entry],
    compression: Compression = "gzip",
    *,
    packages: Sequence[str] = (),
    threads: int = 2,
) -> Layer:
    """Pack files into a layer of the layout. Missing parent folders are added.

    Args:
        what: its kind, such as ``dependencies``.
        packages: pins of what it holds; they are noted on it.
    Raises:
        InvalidInputError: two entries have one path, or a path goes through a file.
        FailedError: a file changed while it was read.
        DiskFullError: no space is left.
    """
    ordered = _with_parents(entries)
    with layout.writer() as writer:
        packed = _Packer(_compressor(writer, compression, threads))
        with packed:
            for entry, twin in _linked(ordered):
                packed.add(entry, twin)
        digest, size = writer.commit()
    annotations = {KIND: what, DIFF_ID: packed.diff_id, SIZE: str(packed.size)}
    if packages:
        annotations[PACKAGES] = " ".join(packages)
    descriptor = Descriptor(MEDIA_TYPES[compression], digest, size, annotations=annotations)
    return Layer(what, descriptor, packed.diff_id, packed.size)


def tree(
    folder: Path, place: str, owner: int = 0, skip: Callable[[str], bool] | None = None
) -> Iterator[Entry]:
    """A folder's files as entries; links stay links, and are never followed.

    Args:
        place: the folder in the image.
        skip: names (of files and folders, at any depth) that are left out.
    Raises:
        InvalidInputError: there is something other than files, folders and links.
    """
    yield Entry.folder(place, owner=owner)
    for parent, folders, names in os.walk(folder):
        below = f"{place}/{os.path.relpath(parent, folder)}" if Path(parent) != folder else place
        if skip is not None:
            folders[:] = [name for name in folders if not skip(name)]
            names = [name for name in names if not skip(name)]
        for name in (*folders, *names):
            path = Path(parent) / name
            if path.is_symlink():
                yield Entry(f"{below}/{name}", "link", 0o777, owner, target=str(path.readlink()))
            elif path.is_dir():
                yield Entry.folder(f"{below}/{name}", owner=owner)
            elif path.is_file():
                yield Entry.copy(f"{below}/{name}", path, owner=owner)
            else:
                raise InvalidInputError(f"{path} is neither file nor folder nor link - remove it")


class _Compressed(Protocol):
    def write(self, content: bytes, /) -> int: ...
    def close(self) -> None: ...


class _Packer:
    """Writes tar records, counts and hashes them."""

    def __init__(self, compressed: AbstractContextManager[_Compressed]) -> None:
        self._entering = compressed
        self._hash = hashlib.sha256()
        self._pending = io.BytesIO()
        self.size = 0

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def __enter__(self) -> None:
        self._compressed = self._entering.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            end = 2 * tarfile.BLOCKSIZE
            self._write(bytes(end + -(self.size + end) % _RECORD))
            self._flush()
        self._entering.__exit__(kind, error, trace)  # type: ignore[arg-type]

    def add(self, entry: Entry, twin: str | None) -> None:
        """Add an entry; ``twin``: the path of an earlier one with the same content."""
        information = tarfile.TarInfo(entry.path[1:])
        information.mode, information.mtime = entry.mode, MTIME
        information.uid = information.gid = entry.owner
        if twin is not None:
            information.type, information.linkname = tarfile.LNKTYPE, twin[1:]
        elif entry.kind == "folder":
            information.type = tarfile.DIRTYPE
        elif entry.kind == "link":
            information.type, information.linkname = tarfile.SYMTYPE, entry.target
        else:
            information.size = entry.size
        self._write(information.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        if information.size:
            self._content(entry, information.size)
            self._write(bytes(-information.size % tarfile.BLOCKSIZE))

    def _content(self, entry: Entry, size: int) -> None:
        if entry.source is None:
            self._write(entry.content)
            return
        left = size
        with entry.source.open("rb", buffering=0) as file:
            while left and (part := file.read(min(left, _BLOCK))):
                self._write(part)
                left -= len(part)
            if left or file.read(1):
                raise FailedError(f"{entry.source} changed while it was packed - try again")

    def _write(self, part: bytes) -> None:
        self.size += len(part)
        self._pending.write(part)
        if self._pending.tell() >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        block = self._pending.getvalue()
        self._pending = io.BytesIO()
        self._hash.update(block)
        self._compressed.write(block)


def _compressor(
    writer: Writer, compression: Compression, threads: int
) -> AbstractContextManager[_Compressed]:
    if compression == "zstd":
        # With threads the output does not depend on their number; without, it is another one.
        compressor = zstandard.ZstdCompressor(level=_LEVEL["zstd"], threads=max(1, threads))
        return cast(
            "AbstractContextManager[_Compressed]",
            compressor.stream_writer(cast("BinaryIO", writer), closefd=False),
        )
    return cast(
        "AbstractContextManager[_Compressed]",
        igzip_threaded.open(  # type: ignore[no-untyped-call]
            writer, "wb", _LEVEL["gzip"], threads=max(1, threads), block_size=_BLOCK
        ),
    )


def _with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """Sorted, each folder before what is in it, with the folders that nobody mentioned."""
    found: dict[str, Entry] = {}
    for entry in entries:
        other = found.get(entry.path)
        if other is not None and not other.kind == entry.kind == "folder":
            raise InvalidInputError(f"{entry.path} is there twice - remove one of the two")
        found[entry.path] = entry
    parents: set[str] = set()
    for path in list(found):
        parent = path.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            if found.setdefault(parent, Entry.folder(parent)).kind != "folder":
                raise InvalidInputError(f"{path} lies below {parent}, which is no folder")
            parent = parent.rpartition("/")[0]
    return [found[path] for path in sorted(found, key=lambda path: path.split("/"))]


def _linked(entries: list[Entry]) -> Iterator[tuple[Entry, str | None]]:
    """Each entry with the path of the first one that has the same content."""
    by_size: dict[tuple[int, int, int], int] = {}
    for entry in entries:
        if key := _size_key(entry):
            by_size[key] = by_size.get(key, 0) + 1
    first: dict[tuple[bytes, int, int], str] = {}
    for entry in entries:
        key = _size_key(entry)
        if key is None or by_size[key] < 2:
            yield entry, None
            continue
        assert entry.source is not None
        with entry.source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        twin = first.setdefault((digest, entry.mode, entry.owner), entry.path)
        yield entry, twin if twin != entry.path else None


def _size_key(entry: Entry) -> tuple[int, int, int] | None:
    if entry.source is None or entry.size < _LINKED_FROM:
        return None
    return entry.size, entry.mode, entry.owner
