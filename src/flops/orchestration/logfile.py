"""The log of one service: a file its processes append to, read from the end, bounded in size."""

import os
from pathlib import Path


def open_log(path: Path) -> int:
    """A descriptor for a service's output; every write goes to the end, whoever truncates the file."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def read_tail(path: Path, tail_bytes: int) -> str:
    """The last whole lines of a log, at most ``tail_bytes``; empty when there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return ""
    with file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - max(0, tail_bytes))
        file.seek(start)
        tail = file.read(size - start)
    if start > 0:
        _, newline, whole_lines = tail.partition(b"\n")
        tail = whole_lines if newline else tail
    return tail.decode(errors="replace")


def cap(path: Path, limit_bytes: int) -> bool:
    """Cut a log that outgrew its limit down to the last half of it, in place.

    Its writer holds the file open, so it cannot be swapped for another. Lines written in the instant
    between reading the tail and truncating are lost.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    tail = read_tail(path, limit_bytes // 2).encode()
    descriptor = open_log(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"[earlier lines were cut off]\n" + tail)
    finally:
        os.close(descriptor)
    return True
