"""Locks: exactly pinned requirements under a hash, stored as readable files.

`LockStore` keeps ``<hash>.txt`` (the lock) and ``requests/<key>.json`` (which lock answered which request).
Both are written whole or not at all; a file that does not match its hash counts as absent.
"""

import hashlib
import json
import os
import re
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{32}")
_PYTHON = re.compile(r"^# python: (\S+)$", re.MULTILINE)
_PLATFORM = re.compile(r"^# platform: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Lock:
    """What to install, to the last version. Equal content, equal ``hash``."""

    hash: str
    python: str
    """Full version of the chosen interpreter, such as ``3.11.2``; of a lock for images: such as ``3.11``."""
    platform: str
    """This machine's, or the one of an image, such as ``linux/arm64``."""
    text: str
    """Header lines starting with ``#``, then one pinned requirement a line, sorted."""
    warnings: tuple[str, ...] = ()
    """What the user should know about this choice; not part of the stored lock."""

    @property
    def packages(self) -> tuple[str, ...]:
        """The pins, such as ``numpy==1.26.4``, sorted."""
        return _pins(self.text)

    @classmethod
    def of(
        cls, python: str, pins: Sequence[str], warnings: Sequence[str] = (), platform: str | None = None
    ) -> "Lock":
        """Make a lock; ``platform`` None: for this machine's."""
        platform = platform or sysconfig.get_platform()
        ordered = _pins("\n".join(pins))
        digest = _digest(python, platform, ordered)
        header = f"# FLOps lock {digest}\n# python: {python}\n# platform: {platform}\n"
        return cls(digest, python, platform, header + "\n".join(ordered) + "\n", tuple(warnings))

    @classmethod
    def parse(cls, text: str) -> "Lock | None":
        """Read a stored lock; None when it is damaged or was edited."""
        python, platform = _PYTHON.search(text), _PLATFORM.search(text)
        first = text.partition("\n")[0].removeprefix("# FLOps lock ")
        if python is None or platform is None:
            return None
        digest = _digest(python[1], platform[1], _pins(text))
        return cls(digest, python[1], platform[1], text) if digest == first else None


@dataclass(frozen=True)
class Answer:
    """Which lock a request got, and what that rested on."""

    lock: Lock
    interpreter: Path | None
    """Where the chosen Python lay; None: the lock is for an image, which brings its own."""


class LockStore:
    """Locks and answered requests in a folder, which is made when first written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, digest: str) -> Lock | None:
        """The stored lock of that hash, or None."""
        if not _HASH.fullmatch(digest):
            return None
        try:
            lock = Lock.parse((self._folder / f"{digest}.txt").read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return lock if lock is not None and lock.hash == digest else None

    def put(self, lock: Lock) -> None:
        write_atomically(self._folder / f"{lock.hash}.txt", lock.text)

    def answer(self, key: str) -> Answer | None:
        """What the request ``key`` got last time, if lock and interpreter are still as they were."""
        try:
            entry = json.loads(self._request(key).read_text(encoding="utf-8"))
            lock = self.get(str(entry["lock"]))
            interpreter = Path(entry["interpreter"]) if entry["interpreter"] is not None else None
            unchanged = _identity(interpreter) == entry["identity"]
            warnings = tuple(str(warning) for warning in entry["warnings"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or damaged: the request is answered anew and the file written over
        if lock is None or not unchanged:
            return None
        return Answer(Lock(lock.hash, lock.python, lock.platform, lock.text, warnings), interpreter)

    def remember(self, key: str, lock: Lock, interpreter: Path | None) -> None:
        self.put(lock)
        entry = {
            "lock": lock.hash,
            "interpreter": None if interpreter is None else str(interpreter),
            "identity": _identity(interpreter),
            "warnings": list(lock.warnings),
        }
        write_atomically(self._request(key), json.dumps(entry, indent=1) + "\n")

    def _request(self, key: str) -> Path:
        return self._folder / "requests" / f"{key}.json"


def request_key(
    packages: Sequence[str],
    extra: Sequence[str],
    python: str | None,
    fingerprint: str,
    platform: str | None = None,
) -> str:
    """A digest of everything a user can change about a request; ``platform`` None: this machine's."""
    request = [sorted(packages), sorted(extra), python, fingerprint, platform or sysconfig.get_platform()]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()[:32]


def write_atomically(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _pins(text: str) -> tuple[str, ...]:
    lines = (line.strip() for line in text.splitlines())
    return tuple(sorted({line for line in lines if line and not line.startswith("#")}))


def _digest(python: str, platform: str, pins: Sequence[str]) -> str:
    content = "\n".join([python, platform, *pins])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _identity(interpreter: Path | None) -> list[int]:
    """Changes when the interpreter is upgraded or replaced."""
    if interpreter is None:
        return []
    status = interpreter.resolve().stat()
    return [status.st_size, status.st_mtime_ns]
