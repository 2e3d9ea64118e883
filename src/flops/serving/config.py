"""What one inference server needs to know: one JSON file, mode 600, written by the manager."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from flops.core.errors import InvalidInputError

Kind = Literal["mlflow", "onnx"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a caller can ask for; more is refused with the status in brackets."""

    body_bytes: int = 16 << 20
    """Size of a request's body (413)."""
    rows: int = 10_000
    """Rows of one request (413)."""
    concurrent: int = 512
    """Requests that are read or worked on at a time (503 with Retry-After)."""
    request_timeout_s: float = 30.0
    """From the last byte of a request to its answer (504). A predictor that works longer is replaced."""
    receive_timeout_s: float = 15.0
    """From the head of a request to the last byte of its body (408), and from a connection's opening to its
    first head (closed)."""
    connections: int = 2_048
    """Open connections; more are closed at once."""
    header_bytes: int = 64 << 10
    """Of a request's first line and headers together; the connection is closed at more."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Requests that wait together are predicted together. Idle predictors never wait."""

    enabled: bool = True
    """Switch it off for models whose answer to one row depends on the rows beside it."""
    max_rows: int = 256


@dataclass(frozen=True, kw_only=True)
class ServingTls:
    """PEM files."""

    cert: str
    key: str


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Everything one inference server needs to know."""

    name: str
    """Of the registered model; its address in the Open Inference Protocol."""
    version: str = "1"
    model: str
    """The model's folder in MLflow's format; with kind ``onnx`` the folder that the conversion wrote."""
    python: str
    """Interpreter of the predictor: the model's own environment (with ``onnx`` numpy and onnxruntime)."""
    kind: Kind = "mlflow"
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one; the ready file says which."""
    predictors: int = 1
    """Processes that hold the model."""
    threads: int | None = 1
    """Of numerical libraries, in each predictor. None: theirs to choose."""
    memory_mb: int | None = None
    """Limit of the private memory of each predictor."""
    isolate: bool = True
    """Cut the predictors' network where the platform allows it."""
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)
    ignore_extra_columns: bool = False
    """Leave out columns that the signature lacks, as MLflow does, instead of refusing the request."""
    token: str | None = None
    """Callers show it as ``Authorization: Bearer``; health needs none. None: everybody may ask."""
    token_file: str | None = None
    """A file with that token; read at the start."""
    tls: ServingTls | None = None
    ready_file: str | None = None
    """Written (JSON: ``url``, ``pid``) when the model answers, and removed at the end."""
    access_log: bool = False
    grace_s: float = 10.0
    """For requests under way when the server is told to end."""
    load_timeout_s: float = 180.0
    """For a predictor to load the model."""
    log: str | None = None
    """A file that the model's code prints to. None: kept until the predictor ends; its last lines are logged
    when it ends by itself."""

    def __post_init__(self) -> None:
        if self.kind not in ("mlflow", "onnx"):
            raise InvalidInputError(f"serving '{self.name}': kind is {self.kind!r} - use mlflow or onnx")
        if not 0 <= self.port < 1 << 16:
            raise InvalidInputError(f"serving '{self.name}': port {self.port} is none - use 0 to 65535")
        counts = {
            "predictors": self.predictors,
            "grace_s": self.grace_s,
            "load_timeout_s": self.load_timeout_s,
            "max_rows": self.batching.max_rows,
            **asdict(self.limits),
        }
        if self.threads is not None:
            counts["threads"] = self.threads
        for name, value in counts.items():
            if value <= 0:
                raise InvalidInputError(f"serving '{self.name}': {name} is {value} - it must be positive")

    def secret(self) -> str | None:
        """The token that callers must show.

        Raises:
            InvalidInputError: the file with it cannot be read, or is empty.
        """
        if self.token_file is None:
            return self.token
        try:
            text = Path(self.token_file).read_text().strip()
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"the token file '{self.token_file}' cannot be read: {error}") from error
        if not text:
            raise InvalidInputError(f"the token file '{self.token_file}' is empty - write a token into it")
        return text

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InvalidInputError when the file is missing or does not fit."""
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InvalidInputError(
                f"the configuration '{path}' cannot be used: {error} - it is written by the manager"
            ) from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            **{
                **data,
                "limits": Limits(**data.get("limits", {})),
                "batching": Batching(**data.get("batching", {})),
                "tls": ServingTls(**data["tls"]) if data.get("tls") else None,
            }
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write the file atomically, readable by its owner only."""
        temporary = path.with_name(path.name + ".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(self.to_json(), file)
        temporary.rename(path)


def serving_command(config_path: str, python: str) -> list[str]:
    """How the server of a configuration is started."""
    return [python, "-m", "flops.serving", "--config", config_path]
