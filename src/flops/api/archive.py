"""A model's files as one tar stream, without a copy of it on disk or in memory."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def tar(files: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    """The bytes of a tar archive (PAX) with the files under the given names, without owners and modes."""
    for name, path in files:
        with path.open("rb") as file:
            info = tarfile.TarInfo(name)
            size = info.size = path.stat().st_size
            info.mtime = int(path.stat().st_mtime)
            info.mode = 0o644
            yield info.tobuf(tarfile.PAX_FORMAT)
            left = size
            while left:
                chunk = file.read(min(_CHUNK_BYTES, left))
                if not chunk:
                    raise OSError(f"{path} became shorter while it was read")
                left -= len(chunk)
                yield chunk
            yield bytes(-size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
