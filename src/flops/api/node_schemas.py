"""What joined nodes and the manager say to each other; see `flops.api.node`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_LOG_CHARS = 65536
_Word = Annotated[str, Field(min_length=1, max_length=200)]
_Words = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=1000)]
_ServiceName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?$")]


class _Request(BaseModel):
    """Strict: JSON has numbers and truth values of its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Joining(_Request):
    token: Annotated[str, Field(pattern=r"^flopsjoin_[0-9a-f]{12}_[A-Za-z0-9_-]{43}$")]
    platform: Annotated[str, Field(pattern=r"^[a-z0-9]+/[a-z0-9_]+$", max_length=40)]
    """Such as ``linux/amd64``."""
    cpus: Annotated[int, Field(ge=1, le=100_000)]
    memory_mb: Annotated[int, Field(ge=1, le=2**31)]
    version: Annotated[str, Field(min_length=1, max_length=40)]
    """Of FLOps on the machine."""


class Joined(BaseModel):
    node: str
    owner: str
    credential: Annotated[str, Field(description="Its text, which nobody can ask for again")]


class NodePolicy(_Request):
    """What a node's owner allows; each empty list allows all."""

    tags: _Words = []
    owners: _Words = []
    teams: _Words = []
    repositories: _Words = []


class Holding(_Request):
    """What a site of a node holds under a set of tags; never rows."""

    site: _Word
    tags: Annotated[list[_Word], Field(min_length=1, max_length=1000)]
    num_examples: Annotated[int, Field(ge=0, le=2**53)]
    size_bytes: Annotated[int, Field(ge=0, le=2**53)]
    allow_metrics: bool = False
    labels: Annotated[dict[_Word, _Word], Field(max_length=100)] = {}


class NodeServiceUsage(_Request):
    """What a running service uses; null: not known."""

    cpu_percent: Annotated[float, Field(ge=0, le=10_000_000)] | None = None
    """Of one processor."""
    memory_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = None
    threads: Annotated[int, Field(ge=0, le=2**31)] | None = None
    received_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = None
    sent_bytes: Annotated[int, Field(ge=0, le=2**53)] | None = None


class NodeServiceReport(_Request):
    name: _ServiceName
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    state: Literal["pending", "running", "exited", "failed", "lost"]
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None
    reason: Annotated[str, Field(max_length=1000)] = ""
    restarts: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    started_at: Annotated[float, Field(ge=0, le=2**40)] | None = None
    usage: NodeServiceUsage | None = None


class NodeReport(_Request):
    known: Annotated[int, Field(ge=-1, le=2**53)] = -1
    """The number of the set that the node knows; -1: none yet."""
    wait_s: Annotated[float, Field(ge=0, le=20)] = 0.0
    """How long the answer may wait for something new."""
    policy: NodePolicy = NodePolicy()
    holdings: Annotated[list[Holding], Field(max_length=5000)] = []
    services: Annotated[list[NodeServiceReport], Field(max_length=1000)] = []
    logs: Annotated[
        dict[_ServiceName, Annotated[str, Field(max_length=MAX_LOG_CHARS)]], Field(max_length=64)
    ] = {}
    """The ends of the logs that the last answer asked for."""


class WantedService(BaseModel):
    name: str
    project: str
    digest: str
    """Of all that is said here: another one is another attempt."""
    assignment: dict[str, Any]
    files: dict[str, str]
    """In base64, by name."""


class NodeOrders(BaseModel):
    number: int
    """Of this set of services."""
    wanted: list[WantedService]
    """All of them: what runs and is not here is to end."""
    logs: list[str]
    """Services whose log is asked for, with the next report."""


class CodeLock(BaseModel):
    python: str
    platform: str
    text: str


class Left(BaseModel):
    node: str


class NewJoinToken(_Request):
    node: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    """What the machine will be called."""
    lasts_s: Annotated[float, Field(gt=0, le=30 * 24 * 3600)] = 86400.0
    owner: Annotated[
        str | None, Field(min_length=1, max_length=60, description="Whose it will be; yours without")
    ] = None


class MadeJoinToken(BaseModel):
    node: str
    token: Annotated[str, Field(description="Its text, which nobody can ask for again")]
    owner: str
    expires: float
