"""What an image's layers hold, found by reading them: nothing is unpacked to a disk, nothing is executed.

Layers come from strangers: each is read in one pass of bounded length, and its content must have the digest
that the image's config promises.
"""

import hashlib
import posixpath
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol, cast

import zstandard
from isal import igzip, isal_zlib

from flops.core.errors import FailedError, InvalidInputError
from flops.images.base_image import BaseImage
from flops.images.descriptor import DOCKER_LAYER_GZIP, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, Descriptor
from flops.images.layout import Layout

_MOST_BYTES = 64 << 30  # of one layer, uncompressed
_MAX_WINDOW = 128 << 20
_MAX_LINKS = 20
_MACHINES = {62: "amd64", 183: "arm64"}
"""ELF's numbers of processors."""
_ELF = struct.Struct("<4sBB10xHH")
_GZIP_ERROR = cast("type[Exception]", isal_zlib.error)
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def check_python(layout: Layout, base: BaseImage) -> None:
    """See whether a base has the interpreter that it says it has, made for its platform.

    Raises:
        InvalidInputError: it has none there, or one for another processor.
        FailedError: a layer is damaged.
    """
    files = _Files()
    for layer, diff_id in zip(base.layers, base.diff_ids, strict=True):
        with _content(layout, layer, base.source) as content:
            files.apply(content)
            content.finish(diff_id)
    machine = files.machine(base.python)
    if machine is None:
        raise InvalidInputError(
            f"base image {base.source} has no Python at {base.python} for {base.platform} - "
            "use a 'python' image, or make one with 'flops images base'"
        )
    wanted = base.platform.split("/")[1]
    if machine not in ("", wanted):
        raise InvalidInputError(
            f"base image {base.source} says that it is made for {base.platform}, its Python is for "
            f"{machine} - name another image"
        )


class _Content:
    """A layer's uncompressed form, counted and hashed as it is read."""

    def __init__(self, stream: _Readable, subject: str) -> None:
        self._stream = stream
        self._subject = subject
        self._hash = hashlib.sha256()
        self._count = 0

    def read(self, size: int) -> bytes:
        part = self._stream.read(size)
        self._hash.update(part)
        self._count += len(part)
        if self._count > _MOST_BYTES:
            raise InvalidInputError(f"{self._subject} is larger than any layer may be - use another image")
        return part

    def finish(self, diff_id: str) -> None:
        """Read what is left, and compare."""
        while self.read(1 << 20):
            pass
        if f"sha256:{self._hash.hexdigest()}" != diff_id:
            raise FailedError(
                f"{self._subject} does not hold what the image's config says - pull or build it again"
            )


class _Files:
    """The interpreters and links of an image, layer by layer."""

    def __init__(self) -> None:
        self._machines: dict[str, str] = {}
        self._links: dict[str, str] = {}

    def apply(self, content: _Content) -> None:
        """Add a layer on top."""
        with tarfile.open(fileobj=cast("BinaryIO", content), mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                path = posixpath.normpath(f"/{member.name.lstrip('/')}")
                folder, name = posixpath.split(path)
                if name == _OPAQUE:
                    self._forget(folder, itself=False)
                elif name.startswith(_WHITEOUT):
                    self._forget(posixpath.join(folder, name.removeprefix(_WHITEOUT)))
                elif not member.isdir():
                    self._machines.pop(path, None)
                    self._links.pop(path, None)
                    self._add(tar, member, path)

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
        if member.issym():
            self._links[path] = member.linkname
        elif member.islnk():
            twin = posixpath.normpath(f"/{member.linkname.lstrip('/')}")
            if twin in self._machines:
                self._machines[path] = self._machines[twin]
        elif member.isreg() and posixpath.basename(path).startswith("python3"):
            file = tar.extractfile(member)
            self._machines[path] = _machine(file.read(_ELF.size) if file is not None else b"")

    def machine(self, path: str) -> str | None:
        """The processor that a program is for (empty: unknown), following links; None: no such file."""
        for _ in range(_MAX_LINKS):
            if path in self._machines:
                return self._machines[path]
            parts = path.split("/")
            prefixes = ["/".join(parts[:count]) for count in range(2, len(parts) + 1)]
            link = next((prefix for prefix in prefixes if prefix in self._links), None)
            if link is None:
                return None
            target = posixpath.join(posixpath.dirname(link), self._links[link])
            path = posixpath.normpath(target + path.removeprefix(link))
        return None

    def _forget(self, path: str, itself: bool = True) -> None:
        for known in (self._machines, self._links):
            gone = [name for name in known if name.startswith(f"{path}/") or (itself and name == path)]
            for name in gone:
                del known[name]


@contextmanager
def _content(layout: Layout, layer: Descriptor, source: str) -> Iterator[_Content]:
    subject = f"layer {layer.digest} of base image {source}"
    try:
        with layout.path(layer.digest).open("rb") as file:
            if layer.media_type in (OCI_LAYER_GZIP, DOCKER_LAYER_GZIP):
                with igzip.IGzipFile(fileobj=file, mode="rb") as unzipped:  # type: ignore[no-untyped-call]
                    yield _Content(cast("_Readable", unzipped), subject)
            elif layer.media_type == OCI_LAYER_ZSTD:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
                with decompressor.stream_reader(file, read_across_frames=True, closefd=False) as unpacked:
                    yield _Content(cast("_Readable", unpacked), subject)
            else:
                yield _Content(file, subject)
    except (OSError, EOFError, _GZIP_ERROR, zstandard.ZstdError) as error:
        raise FailedError(f"{subject} cannot be read: {error} - pull or build it again") from error
    except (tarfile.TarError, ValueError) as error:
        raise InvalidInputError(f"{subject} is not a tar file - use another image") from error


def _machine(start: bytes) -> str:
    if len(start) < _ELF.size:
        return ""
    magic, bits, order, _, number = _ELF.unpack(start)
    return _MACHINES.get(number, "") if (magic, bits, order) == (b"\x7fELF", 2, 1) else ""
