"""The program that runs inside the user's own environment: standard library and numpy only.

It runs with the user's interpreter, started by `flops.guest`, or by `flops_worker.keeper` in a container of
its own; it speaks over one inherited Unix socket, and never imports FLOps. Python 3.8 and newer.
"""

CUT_OFF = 75
"""The exit code of a worker whose channel was closed: nothing that user code did (EX_TEMPFAIL)."""

DISMISSED = 76
"""The exit code of a worker whose agent said that there is nothing more to do."""
