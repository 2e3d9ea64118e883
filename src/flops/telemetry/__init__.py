"""What FLOps tells of itself: log lines of one form in all programs, the request that each is written for,
and spans, where somebody collects them.
"""

from flops.telemetry.context import (
    FIELDS,
    MAX_REQUEST_CHARS,
    NOBODYS,
    Traced,
    about,
    always,
    current,
    current_request,
    is_request,
    new_request,
    request_of,
    trace_of,
)
from flops.telemetry.lines import (
    JsonLines,
    Line,
    belongs,
    log_lines,
    parse,
    readable,
    said,
    without_credentials,
)

__all__ = [
    "FIELDS",
    "MAX_REQUEST_CHARS",
    "NOBODYS",
    "JsonLines",
    "Line",
    "Traced",
    "about",
    "always",
    "belongs",
    "current",
    "current_request",
    "is_request",
    "log_lines",
    "new_request",
    "parse",
    "readable",
    "request_of",
    "said",
    "trace_of",
    "without_credentials",
]
