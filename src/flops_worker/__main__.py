"""Serve one checkout: ``python -m flops_worker --fd N --code DIR`` over an inherited Unix socket, or, in a
container of its own, ``python -m flops_worker --connect SOCKET --code DIR``.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import io
import os
import socket
import sys
from pathlib import Path
from typing import Any, Optional, Sequence


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="flops_worker", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--fd", type=int, help="the inherited end of the channel")
    where.add_argument("--connect", metavar="SOCKET", help="where the agent listens, or will")
    parser.add_argument("--code", required=True, help="the checkout: working directory and first import path")
    parser.add_argument("--threads", type=int, help="of numerical libraries; with --connect")
    options = parser.parse_args(arguments)
    if options.connect is not None:
        from flops_worker.keeper import keep

        return keep(options.connect, str(Path(options.code).absolute()), options.threads)
    return serve(options.fd, options.code)


def serve(fd: int, checkout: str) -> int:
    """Run the user's code in this process; returns its exit code."""
    faulthandler.enable()
    sys.stdout, sys.stderr = _lenient(1), _lenient(2)
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"numpy cannot be imported in the repository's environment ({error})"
            " - add numpy to its conda.yaml or requirements.txt\n"
        )
        return 1
    from flops_worker import CUT_OFF, DISMISSED
    from flops_worker.session import Session

    code = str(Path(checkout).absolute())
    os.chdir(code)
    # Only now, when everything of FLOps is imported: a file of the user's may bear any name.
    sys.path[0:1] = [code]
    return DISMISSED if Session(sock, code).serve() else CUT_OFF


class _Log(io.FileIO):
    """The log that user code prints to; a full disk costs its lines, not the training."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def _lenient(fd: int) -> io.TextIOWrapper:
    # As `python -u` does: no buffer, so that nothing is lost when the process is killed.
    raw: Any = _Log(fd, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)


if __name__ == "__main__":
    sys.exit(main())
