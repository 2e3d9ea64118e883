"""Records: what a project tells the tracker, as lines of JSON that outlive the process that wrote them.

Shipping one record twice has the same effect as shipping it once, so whoever is unsure whether a record was
written appends it again, with the same ``time`` (metrics are told apart by name, round, time and value).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from flops.core.errors import InvalidInputError

# MLflow keeps milliseconds and steps as 64-bit integers; what it can never store is refused at once.
Time = Annotated[float, Field(ge=0, le=1e12)]
Round = Annotated[int, Field(ge=0, lt=1 << 63)]
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The project's run: made on first sight, its tags and parameters added to on later ones; a run that had
    ended goes on. It lies in an experiment of its ``audience``: the one that is asked for, or one of a longer
    name where that is another's.
    """

    time: Time
    experiment: str
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    audience: str = ""
    kind: Literal["run"] = "run"


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """Figures of one round; ``step`` is the round, ``time`` the moment it was evaluated. Those of a
    ``cluster`` go to a run of its own, a child of the project's.
    """

    time: Time
    step: Round
    metrics: Mapping[str, float]
    cluster: str | None = None
    kind: Literal["metrics"] = "metrics"


@dataclass(frozen=True, kw_only=True)
class ModelExported:
    """A folder in MLflow's model format, to be logged and registered as the next version of ``name``; where
    a model of that name is another ``audience``'s, of a longer one.

    ``directory`` and ``parameters`` (a safetensors file that is put beside the MLmodel file) must stay in
    place until the project's `Result` names the model. ``aliases`` move to the new version. ``rounds`` were
    trained in all: of the same project and round, other ``rounds`` are another version.
    """

    time: Time
    round: Round
    name: str
    directory: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    parameters: str | None = None
    aliases: tuple[str, ...] = ()
    rounds: Round = 0
    audience: str = ""
    kind: Literal["model"] = "model"


@dataclass(frozen=True, kw_only=True)
class ArtifactExported:
    """One file, kept with the run under its own name: parameters of a model that could not be exported."""

    time: Time
    round: Round
    file: str
    rounds: Round = 0
    kind: Literal["artifact"] = "artifact"


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """The project is over."""

    time: Time
    status: RunStatus
    reason: str = ""
    kind: Literal["end"] = "end"


Record = RunStarted | RoundMetrics | ModelExported | ArtifactExported | RunEnded

# Metrics may be NaN or infinite, which JSON numbers cannot say. Unknown fields come from a newer writer.
_ADAPTER: TypeAdapter[Record] = TypeAdapter(
    Annotated[Record, Field(discriminator="kind")],
    config=ConfigDict(ser_json_inf_nan="strings", extra="ignore"),
)


def record_to_json(record: Record) -> bytes:
    """One line of JSON, without its newline.

    Raises:
        InvalidInputError: it would not be read back: a value has the wrong type or is out of bounds.
    """
    try:
        line = _ADAPTER.dump_json(record, warnings="error")
        _ADAPTER.validate_json(line)
    except (PydanticSerializationError, ValidationError) as error:
        cause = _first(error) if isinstance(error, ValidationError) else str(error)
        raise InvalidInputError(f"a '{record.kind}' record cannot be written: {cause}") from error
    return line


def record_from_json(line: bytes | str) -> Record:
    """Read one line.

    Raises:
        InvalidInputError: the line is no record.
    """
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise InvalidInputError(f"a line is no tracking record: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    problem: Any = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else str(problem["msg"])
