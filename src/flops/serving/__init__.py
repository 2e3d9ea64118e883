"""Serving: an inference server for trained models, whose code runs in an environment of its own.

Owns the two protocols (MLflow's scoring, Open Inference v2), the check of what callers send against the
model's signature, batching, and the processes that hold the model (`flops_worker.predictor`). Promises: a
request is answered or refused within its time, whatever the model does; nothing that comes from a caller or
from the model's process is ever unpickled or run here; when told to end, what was accepted is still answered.
"""

from flops.serving.config import Batching, Limits, ServingConfig, ServingTls, serving_command

__all__ = [
    "Batching",
    "Limits",
    "ServingConfig",
    "ServingTls",
    "serving_command",
]
