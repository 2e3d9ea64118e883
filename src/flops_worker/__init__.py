"""The program that runs inside the user's own environment: standard library and numpy only.

It is started by `flops.guest` with the user's interpreter, speaks over one inherited Unix socket, and
never imports FLOps. Python 3.8 and newer.
"""

CUT_OFF = 75
"""The exit code of a worker whose channel was closed: nothing that user code did (EX_TEMPFAIL)."""
