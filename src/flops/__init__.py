"""FLOps: from a link to a plain machine-learning repository to a federated, tracked, registered model."""

__version__ = "0.1.0"
