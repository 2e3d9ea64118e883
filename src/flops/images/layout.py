"""A folder of blobs and tags: an OCI image layout, which skopeo, buildah and podman read too.

Promises: a blob is there whole or not at all, and under the digest of its content; several threads and
processes may read, add, tag and collect at once. A blob that somebody added or asked for within the last hour
is not collected, so what is built now and tagged in the end does not vanish in between.

Source:
    OCI image layout specification 1.1; tags are ``org.opencontainers.image.ref.name`` in index.json.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from flops.core.disk import disk_full, is_full
from flops.core.errors import FailedError, InvalidInputError, NotFoundError
from flops.images.descriptor import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT_BYTES,
    OCI_INDEX,
    Descriptor,
    check_digest,
)
from flops.images.exclusion import exclusive
from flops.images.locks import write_atomically

KEPT_S = 3600.0
"""How long a blob that nothing refers to stays after it was last added or asked for."""

_TAG = "org.opencontainers.image.ref.name"
_TAG_FORM = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:@/+-]{0,253}[A-Za-z0-9])?")
_TOUCH_AFTER_S = 60.0


class Layout:
    """An OCI image layout in a folder, which is made when first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._incoming = folder / "incoming"

    def path(self, digest: str) -> Path:
        """Where the blob lies, or would lie. Files there are never changed: open them for reading only."""
        return self._blobs / check_digest(digest).removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        """Whether the blob is here; it then stays for an hour at least."""
        path = self.path(digest)
        try:
            if time.time() - path.stat().st_mtime > _TOUCH_AFTER_S:
                os.utime(path)
        except OSError:
            return False
        return True

    def read(self, digest: str, limit_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
        """A blob's content, checked against its digest.

        Raises:
            NotFoundError: it is not here.
            InvalidInputError: it has more than ``limit_bytes``.
            FailedError: the file was changed or damaged.
        """
        try:
            with self.path(digest).open("rb") as file:
                content = file.read(limit_bytes + 1)
        except FileNotFoundError as error:
            raise NotFoundError(
                f"blob {digest} is not in {self.folder} - pull or build its image again"
            ) from error
        if len(content) > limit_bytes:
            raise InvalidInputError(
                f"blob {digest} has more than {limit_bytes} bytes, too many for a document"
            )
        if _digest(content) != digest:
            raise FailedError(
                f"blob {digest} in {self.folder} is damaged - remove it, pull or build it again"
            )
        return content

    def read_json(self, descriptor: Descriptor) -> dict[str, Any]:
        """The document that a descriptor names, checked against digest and size.

        Raises:
            InvalidInputError: it is no JSON object, or has another size.
            NotFoundError, FailedError: see `read`.
        """
        content = self.read(descriptor.digest)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"blob {descriptor.digest} is not the JSON it should be") from error
        if not isinstance(document, dict) or len(content) != descriptor.size:
            raise InvalidInputError(f"blob {descriptor.digest} is not the document that was announced")
        return document

    def add(self, content: bytes) -> str:
        """Keep a blob; gives its digest."""
        digest = _digest(content)
        if not self.has(digest):
            with self.writer() as writer:
                writer.write(content)
                writer.commit(digest)
        return digest

    def add_json(self, document: Mapping[str, Any], media_type: str, **more: Any) -> Descriptor:
        """Keep a document; equal ones have equal digests. ``more``: further fields of the descriptor."""
        content = json.dumps(document, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()
        return Descriptor(media_type, self.add(content), len(content), **more)

    def writer(self) -> "Writer":
        """To write a blob of any size piece by piece; ``with layout.writer() as writer: ...``."""
        self._make()
        return Writer(self)

    def tag(self, name: str, descriptor: Descriptor) -> None:
        """Give a manifest or index a name, in place of whatever had it.

        Raises:
            InvalidInputError: the name or the kind of blob is not allowed.
            NotFoundError: the blob is not here.
        """
        if not _TAG_FORM.fullmatch(name):
            raise InvalidInputError(f"'{name[:80]}' cannot name an image - use letters, digits and ._:@/+-")
        if descriptor.media_type not in MANIFESTS | INDEXES:
            raise InvalidInputError(
                f"{descriptor.digest} is a {descriptor.media_type}, only images have names"
            )
        if not self.has(descriptor.digest):
            raise NotFoundError(f"blob {descriptor.digest} is not in {self.folder} - pull or build it first")
        with self._locked():
            tags = dict(self.tags())
            tags[name] = descriptor
            self._write_tags(tags)

    def untag(self, name: str) -> None:
        """Take a name away; what only it referred to is left for `collect`. No such name is no error."""
        with self._locked():
            tags = dict(self.tags())
            if tags.pop(name, None) is not None:
                self._write_tags(tags)

    def resolve(self, name: str) -> Descriptor:
        """What a name stands for.

        Raises:
            NotFoundError: nothing has that name.
        """
        found = self.tags().get(name)
        if found is None:
            raise NotFoundError(f"no image in {self.folder} is named '{name[:80]}' - pull or build it")
        return found

    def tags(self) -> Mapping[str, Descriptor]:
        """All names.

        Raises:
            FailedError: index.json is damaged.
        """
        try:
            document = json.loads((self.folder / "index.json").read_bytes())
            entries = [Descriptor.from_json(entry) for entry in document["manifests"]]
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, InvalidInputError) as error:
            raise FailedError(
                f"{self.folder / 'index.json'} is damaged - remove it, pull and build its images again"
            ) from error
        return {
            entry.annotations[_TAG]: entry.with_annotations(
                {key: text for key, text in entry.annotations.items() if key != _TAG}
            )
            for entry in entries
            if _TAG in entry.annotations
        }

    def collect(self, kept_s: float = KEPT_S) -> int:
        """Remove blobs that no name leads to and nobody asked for in ``kept_s``; gives how many bytes."""
        if not self._blobs.is_dir():
            return 0
        freed = 0
        before = time.time() - kept_s
        with self._locked():
            live = self._live()
            for path in (*self._blobs.iterdir(), *self._incoming.iterdir()):
                if path.parent == self._blobs and f"sha256:{path.name}" in live:
                    continue
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if status.st_mtime < before:
                        path.unlink()
                        freed += status.st_size
        return freed

    def references(self, descriptor: Descriptor) -> list[Descriptor]:
        """What a manifest or index refers to, its subject included; nothing for other blobs.

        Raises:
            InvalidInputError: the document is malformed.
            NotFoundError, FailedError: see `read`.
        """
        if descriptor.media_type not in MANIFESTS | INDEXES:
            return []
        document = self.read_json(descriptor)
        found: list[object] = [document[key] for key in ("config", "subject") if key in document]
        for key in ("layers", "manifests"):
            several = document.get(key, [])
            if not isinstance(several, list):
                raise InvalidInputError(f"{key} of {descriptor.digest} is not a list")
            found += several
        return [Descriptor.from_json(value) for value in found]

    def _live(self) -> set[str]:
        live: set[str] = set()
        pending = list(self.tags().values())
        while pending:
            descriptor = pending.pop()
            if descriptor.digest not in live:
                live.add(descriptor.digest)
                # An image whose documents are gone or broken keeps nothing alive.
                with suppress(NotFoundError, InvalidInputError, FailedError):
                    pending += self.references(descriptor)
        return live

    def _make(self) -> None:
        for folder in (self._blobs, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "oci-layout").exists():
            write_atomically(self.folder / "oci-layout", '{"imageLayoutVersion":"1.0.0"}')

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time, among threads and processes."""
        self._make()
        with exclusive(self.folder / ".lock"):
            yield

    def _write_tags(self, tags: Mapping[str, Descriptor]) -> None:
        manifests = [
            descriptor.with_annotations({**descriptor.annotations, _TAG: name}).to_json()
            for name, descriptor in sorted(tags.items())
        ]
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        write_atomically(self.folder / "index.json", json.dumps(document, indent=1) + "\n")


class Writer:
    """A blob on its way into a layout; leaving the ``with`` block without `commit` throws it away."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._hash = hashlib.sha256()
        self._size = 0
        fd, name = tempfile.mkstemp(dir=layout.folder / "incoming")
        self._temporary = Path(name)
        self._file: BinaryIO = os.fdopen(fd, "wb")

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, content: bytes | memoryview) -> int:
        """Add a piece.

        Raises:
            DiskFullError: no space is left.
        """
        try:
            self._file.write(content)
        except OSError as error:
            raise self._translated(error) from error
        self._hash.update(content)
        self._size += len(content)
        return len(content)

    def flush(self) -> None:
        """For compressors that write into this."""

    def commit(self, expected_digest: str | None = None) -> tuple[str, int]:
        """Keep the blob; gives digest and size.

        Raises:
            FailedError: the content has another digest than expected; nothing is kept.
            DiskFullError: no space is left.
        """
        digest = f"sha256:{self._hash.hexdigest()}"
        if expected_digest is not None and digest != expected_digest:
            raise FailedError(
                f"blob {expected_digest} came with the digest {digest}: it was damaged or changed on its way"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.chmod(0o644)
            self._temporary.replace(self._layout.path(digest))
        except OSError as error:
            raise self._translated(error) from error
        return digest, self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be flushed is thrown away
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _translated(self, error: OSError) -> Exception:
        if is_full(error):
            return disk_full(self._layout.folder, "an image")
        return FailedError(f"a blob cannot be written to {self._layout.folder}: {error.strerror}")


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
