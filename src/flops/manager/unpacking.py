"""A backup's archive, unpacked and checked: nothing in it is trusted but what its sums and names allow."""

import hashlib
import io
import json
import math
import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from flops.core.errors import InvalidInputError
from flops.core.ids import project_id
from flops.manager.backup import FORMAT, FORMAT_VERSION, MANIFEST, SUMS
from flops.persistence import revisions

MAX_SMALL_BYTES = 64 << 20
"""Of the manifest, of the sums, and of one row."""
_MAX_MEMBERS = 200_000
_PART_BYTES = 1 << 20
_TABLE = re.compile(r"tables/([a-z_]{1,60})\.jsonl")
_FILE = re.compile(r"files/(projects/[^/]+/config|models/[^/]+/[1-9][0-9]{0,8})/.+", re.DOTALL)


class Refused(Exception):
    """The archive cannot be what we wrote."""


class _Bounded(io.FileIO):
    """A file that nobody reads much of at once: a header may claim to be as long as it likes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 2 * _PART_BYTES:
            raise Refused("a header is too large")
        return super().read(size) or b""


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """Write the members below the folder; answers the manifest."""
    sums: dict[str, str] = {}
    with _Bounded(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for count, member in enumerate(tar):
            if count >= _MAX_MEMBERS or SUMS in sums:
                raise Refused("it goes on behind its end")
            name = _checked_name(member)
            sums[name] = _write(tar, member, folder / name)
    _check_sums(folder, sums)
    return _manifest(parse_json((folder / MANIFEST).read_bytes()))


def _checked_name(member: tarfile.TarInfo) -> str:
    name = member.name
    if not member.isreg() or member.sparse is not None:
        raise Refused(f"'{name[:200]}' is no plain file")
    parts = PurePosixPath(name).parts
    if len(name) > 1000 or "\0" in name or ".." in parts or "/".join(parts) != name:
        raise Refused(f"'{name[:200]}' is no name")
    if name not in (MANIFEST, SUMS) and not _TABLE.fullmatch(name) and not _FILE.fullmatch(name):
        raise Refused(f"'{name[:200]}' does not belong there")
    if parts[1:2] == ("projects",):
        try:
            project_id(parts[2])
        except InvalidInputError as error:
            raise Refused(str(error)) from error
    if name in (MANIFEST, SUMS) and member.size > MAX_SMALL_BYTES:
        raise Refused(f"'{name}' is too large")
    return name


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    content = tar.extractfile(member)
    assert content is not None
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise Refused(f"'{member.name[:200]}' is in it twice") from error
    with os.fdopen(fd, "wb") as file:
        left = member.size
        while left:
            part = content.read(min(_PART_BYTES, left))
            if not part:
                raise Refused(f"it ends within '{member.name[:200]}'")
            left -= len(part)
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    if sums.pop(SUMS, None) is None:
        raise Refused("its end is missing")
    told = parse_json((folder / SUMS).read_bytes())
    if not isinstance(told, dict):
        raise Refused("its sums are none")
    differing = sorted(name for name in told.keys() | sums.keys() if told.get(name) != sums.get(name))
    if differing:
        raise Refused(f"'{differing[0][:200]}' is damaged")
    if MANIFEST not in sums:
        raise Refused(f"it has no {MANIFEST}")


def _manifest(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Refused(f"its {MANIFEST} is none of ours")
    rows, created = content.get("rows"), content.get("created")
    if not isinstance(rows, dict) or not isinstance(created, int | float) or not math.isfinite(created):
        raise Refused(f"its {MANIFEST} is incomplete")
    if content.get("version") != FORMAT_VERSION or content.get("revision") not in revisions():
        raise InvalidInputError(
            f"the backup was made by FLOps {str(content.get('flops'))[:40]}, which is newer than this one - "
            "restore it with that version"
        )
    return content


def parse_json(text: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise Refused(f"it holds {constant}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(f"it holds what is no JSON ({str(error)[:100]})") from error
