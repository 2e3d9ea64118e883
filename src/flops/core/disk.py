"""Full disks: how they are told from other failures, and in which words."""

import errno
from pathlib import Path

from flops.core.errors import UnavailableError

EXIT_WITHOUT_SPACE = 75
"""The exit code (EX_TEMPFAIL) of a program that found none: try again later, nothing has failed."""


class DiskFullError(UnavailableError):
    """There is no space left: whoever waits for it loses nothing, and goes on once there is."""


def is_full(error: BaseException) -> bool:
    """Whether an operation failed for want of space, or over a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(folder: Path, subject: str) -> DiskFullError:
    """The error for a folder without space; ``subject`` is what waits, such as ``project p-7k2mqd``."""
    return DiskFullError(f"no space is left in {folder} - free some there: {subject} waits, and then goes on")
