"""Base images: what every other image is built on, made here from Debian's packages or taken from a registry.

Promises: nothing of a base is executed to make, find or check it; a base made here has equal digests for
equal packages; the same one is made once and shared by all projects, several callers may ask at once.
"""

import hashlib
import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from isal import isal_zlib

from flops.core.errors import FailedError, InvalidInputError, NotFoundError
from flops.images import debian, uv
from flops.images.base_image import PYTHON, PYTHON_VERSION, BaseImage, read_base
from flops.images.descriptor import (
    INDEXES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
)
from flops.images.layout import Layout, Writer

SUITE = "bookworm"
PLATFORMS = ("linux/amd64", "linux/arm64")
PACKAGES = "io.flops.debian.packages"
"""Annotation of a base made here: ``name=version`` of every package in it."""

_TAG = "flops-base"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COMPRESSION = 2  # of isal's 0 to 3
_PIECE_BYTES = 1 << 20
_WAIT_S = 0.2
_making = threading.Lock()


def make_base(
    layout: Layout,
    suite: str = SUITE,
    platforms: Sequence[str] = PLATFORMS,
    *,
    mirror: str | None = None,
    refresh: bool = False,
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Mapping[str, BaseImage]:
    """The base from a Debian suite, made for those platforms that it is not there for.

    It is named ``flops-base:SUITE`` in the layout.

    Args:
        mirror: a Debian mirror's address; None: those of this machine's apt.
        refresh: make it again from the packages of today.
        cancel: set it from another thread to end the call; what is there already stays.
    Raises:
        InvalidInputError: no such suite, or not for such a platform.
        UnavailableError: mmdebstrap is not installed, or the mirror cannot be reached, or no space is left.
        FailedError: mmdebstrap failed otherwise, or ``cancel`` was set.
    """
    wanted = sorted(set(platforms))
    if not wanted:
        raise InvalidInputError("a base image needs a platform - name one such as linux/amd64")
    name = f"{_TAG}:{suite}"
    tell = progress or _ignore
    with _one_at_a_time(tell, cancel):
        known = _known(layout, name)
        missing = [platform for platform in wanted if refresh or platform not in known]

        def make(platform: str) -> Descriptor:
            tell(f"unpacking Debian {suite} for {platform}")
            with tempfile.TemporaryDirectory(prefix="flops-base-") as folder:
                found = debian.unpack(
                    suite, platform, Path(folder), mirror=mirror, environment=environment, cancel=cancel
                )
                tell(f"writing the base image for {platform}")
                return _write(layout, found, suite, platform, cancel)

        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:
                known |= dict(zip(missing, pool.map(make, missing), strict=True))
            manifests = [known[platform].to_json() for platform in sorted(known)]
            document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
            layout.tag(name, layout.add_json(document, OCI_INDEX))
    return {platform: read_base(layout, known[platform], platform, name) for platform in wanted}


def made_bases(layout: Layout) -> Mapping[str, Descriptor]:
    """The bases made here, by suite."""
    start = f"{_TAG}:"
    return {
        name.removeprefix(start): found for name, found in layout.tags().items() if name.startswith(start)
    }


def _known(layout: Layout, name: str) -> dict[str, Descriptor]:
    """The manifests of a base made before, by platform; without those that are not whole any more."""
    try:
        index = layout.resolve(name)
        listed = layout.references(index) if index.media_type in INDEXES else []
    except (NotFoundError, InvalidInputError, FailedError):
        return {}
    known: dict[str, Descriptor] = {}
    for manifest in listed:
        try:
            read_base(layout, manifest, str(manifest.platform), name)
        except (NotFoundError, InvalidInputError, FailedError):
            continue
        known[str(manifest.platform)] = manifest
    return known


def _write(
    layout: Layout, found: debian.Debian, suite: str, platform: str, cancel: threading.Event | None
) -> Descriptor:
    """The layer, config and manifest of one platform."""
    with layout.writer() as writer:
        stream = _Compressed(writer)
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=_PIECE_BYTES) as tar:
            for entry in found.entries:
                if cancel is not None and cancel.is_set():
                    raise FailedError("making a base image was stopped on request")
                _add(tar, entry)
        diff_id = stream.finish()
        layer = Descriptor(OCI_LAYER_GZIP, *writer.commit())
    system, architecture = platform.split("/")
    config = {
        "architecture": architecture,
        "os": system,
        "created": "1970-01-01T00:00:00Z",
        "config": {
            "Env": [f"PATH={_PATH}", "LANG=C.UTF-8"],
            "User": f"{debian.USER_ID}:{debian.USER_ID}",
            "Cmd": [found.python],
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"Debian {suite}"}],
    }
    packages = " ".join(f"{name}={version}" for name, version in sorted(found.packages.items()))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": layout.add_json(config, OCI_CONFIG).to_json(),
        "layers": [layer.to_json()],
        "annotations": {
            PYTHON: found.python,
            PYTHON_VERSION: found.python_version,
            PACKAGES: packages,
            "org.opencontainers.image.title": f"Debian {suite} with Python {found.python_version}",
        },
    }
    return layout.add_json(manifest, OCI_MANIFEST, platform=platform)


def _add(tar: tarfile.TarFile, entry: debian.Entry) -> None:
    info = tarfile.TarInfo(entry.path)
    info.mode = entry.mode
    if entry.target is not None:
        info.type, info.linkname = tarfile.SYMTYPE, entry.target
        tar.addfile(info)
    elif entry.is_folder:
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
    elif entry.file is not None:
        with entry.file.open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            tar.addfile(info, file)
    else:
        content = entry.content or b""
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


class _Compressed(io.RawIOBase):
    """Takes a layer's tar and writes it compressed; knows the digest of the uncompressed form."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._hash = hashlib.sha256()
        self._compressor = isal_zlib.compressobj(_COMPRESSION, wbits=31)

    def writable(self) -> bool:
        return True

    def write(self, content: bytes, /) -> int:  # type: ignore[override] # tarfile writes bytes
        self._hash.update(content)
        self._writer.write(self._compressor.compress(content))
        return len(content)

    def finish(self) -> str:
        """Write what is left; gives the uncompressed form's digest."""
        self._writer.write(self._compressor.flush())
        return f"sha256:{self._hash.hexdigest()}"


@contextmanager
def _one_at_a_time(tell: uv.Progress, cancel: threading.Event | None) -> Iterator[None]:
    if not _making.acquire(blocking=False):
        tell("waiting: the same base image is being made for another project")
        while not _making.acquire(timeout=_WAIT_S):
            if cancel is not None and cancel.is_set():
                raise FailedError("waiting for a base image was stopped on request")
    try:
        yield
    finally:
        _making.release()


def _ignore(_message: str) -> None:
    return
