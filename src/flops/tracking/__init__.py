"""Tracking: runs, metrics and models in MLflow, never in the path of training.

The manager writes records into a `Spool`, which costs one disk write; a recorder process ships them to
MLflow and answers with one `Result` for each project. MLflow down, slow or full: the spool keeps
everything and the recorder tries for ever. Importing this room does not import MLflow (3 s, 160 MB); its
processes do.
"""

from flops.tracking.commands import (
    AUDIENCES_HEADER,
    CHANGES,
    EVERYTHING,
    GUI_PREFIX,
    GUI_SOCKET,
    SECRET_HEADER,
    gui_command,
    is_server,
    recorder_command,
    tracking_environment,
)
from flops.tracking.naming import audience, run_started
from flops.tracking.nudge import Listener
from flops.tracking.records import (
    ArtifactExported,
    ModelExported,
    Record,
    RoundMetrics,
    RunEnded,
    RunStarted,
)
from flops.tracking.results import KeptArtifact, RecorderStatus, Refusal, RegisteredModel, Result
from flops.tracking.spool import Spool
from flops.tracking.store import open_store

__all__ = [
    "AUDIENCES_HEADER",
    "CHANGES",
    "EVERYTHING",
    "GUI_PREFIX",
    "GUI_SOCKET",
    "SECRET_HEADER",
    "ArtifactExported",
    "KeptArtifact",
    "Listener",
    "ModelExported",
    "Record",
    "RecorderStatus",
    "Refusal",
    "RegisteredModel",
    "Result",
    "RoundMetrics",
    "RunEnded",
    "RunStarted",
    "Spool",
    "audience",
    "gui_command",
    "is_server",
    "open_store",
    "recorder_command",
    "run_started",
    "tracking_environment",
]
