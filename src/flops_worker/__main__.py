"""``python -m flops_worker --fd N --code DIR``: serve one checkout over an inherited Unix socket."""

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
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the channel")
    parser.add_argument("--code", required=True, help="the checkout: working directory and first import path")
    options = parser.parse_args(arguments)

    faulthandler.enable()
    sys.stdout, sys.stderr = _lenient(1), _lenient(2)
    os.set_inheritable(options.fd, False)
    sock = socket.socket(fileno=options.fd)
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"numpy cannot be imported in the repository's environment ({error})"
            " - add numpy to its conda.yaml or requirements.txt\n"
        )
        return 1
    from flops_worker import CUT_OFF
    from flops_worker.session import Session

    code = str(Path(options.code).absolute())
    os.chdir(code)
    # Only now, when everything of FLOps is imported: a file of the user's may bear any name.
    sys.path[0:1] = [code]
    Session(sock, code).serve()
    return CUT_OFF


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
