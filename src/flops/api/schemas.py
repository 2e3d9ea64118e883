"""What goes over the wire, as pydantic models; the OpenAPI document is made from them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Problem(BaseModel):
    """An error, as RFC 9457 wants it; ``code`` is stable, ``detail`` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request: str | None = None
    """Id of the request, as in the header ``X-Request-ID``: name it when you ask about it."""


class _Request(BaseModel):
    """Strict: JSON has numbers and truth values of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Health(BaseModel):
    status: Literal["ok", "standby"] = "ok"
    version: str
    pid: int
    active: str | None = None
    """Of a manager that stands by: where the one is that acts."""


class Check(BaseModel):
    ok: bool
    reason: str | None


class Readiness(BaseModel):
    ready: bool
    checks: dict[str, Check]
    """``database``, ``orchestrator``, ``recorder``."""


class NodeAllowance(BaseModel):
    """What the owner of a joined node allows; each empty list allows all."""

    tags: list[str]
    owners: list[str]
    teams: list[str]
    repositories: list[str]


class NodeView(BaseModel):
    """A machine that runs services: the orchestrator's, or one that joined."""

    name: str
    platform: str
    cpus: int
    memory_mb: int
    labels: dict[str, str]
    address: str
    ready: bool
    kind: Literal["orchestrator", "joined"] = "orchestrator"
    owner: str | None = None
    """Of a joined one, as all that follows."""
    joined: float | None = None
    last_seen: float | None = None
    tags: list[str] = []
    """Of the data that it holds."""
    policy: NodeAllowance | None = None
    version: str | None = None
    """Of FLOps."""


class NodeList(BaseModel):
    nodes: list[NodeView]


class TopNode(BaseModel):
    """A machine, and what the shown services on it use together."""

    name: str
    ready: bool
    cpus: int
    capacity_bytes: int
    services: int
    cpu_percent: float | None
    """Of one processor: four busy ones are 400."""
    memory_bytes: int | None


class TopService(BaseModel):
    """A service, and what it uses; null: nobody counts it there."""

    node: str
    project: str
    """``flops``: the manager's own."""
    name: str
    role: str
    learner: str | None
    cluster: str | None
    state: str
    restarts: int
    round: int | None
    rounds: int | None
    cpu_percent: float | None
    memory_bytes: int | None
    threads: int | None
    received_bytes: int | None
    """Over its network since its start; of a root aggregator without a network of its own: as it reported."""
    sent_bytes: int | None
    received_bytes_per_s: float | None
    sent_bytes_per_s: float | None


class TopTotals(BaseModel):
    services: int
    cpu_percent: float | None
    memory_bytes: int | None
    threads: int | None
    received_bytes_per_s: float | None
    sent_bytes_per_s: float | None


class Top(BaseModel):
    time: float
    away: str | None
    """Why an orchestrator cannot be asked; null: all can."""
    nodes: list[TopNode]
    services: list[TopService]
    totals: TopTotals


class Submission(_Request):
    spec: dict[str, Any]
    """Our own form or the SLA of the FLOps thesis."""
    team: Annotated[str | None, Field(max_length=60, pattern=r"^[a-z0-9]([a-z0-9._@+-]*[a-z0-9])?$")] = None
    """One of yours, whose members see and change the project, its runs and models, like you."""


class Extension(_Request):
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    """More than the project has; in a hierarchy: cycles."""


class LearnerView(BaseModel):
    id: str
    site: str
    node: str = ""
    """The one that holds the site's data; empty: this machine."""
    cluster: str | None
    state: str
    reason: str | None


class ClusterView(BaseModel):
    id: str
    """Its path: ``europe/north`` lies in ``europe``."""
    parent: str | None
    state: str
    reason: str | None
    rounds_done: int
    """Over all cycles."""


class ModelRef(BaseModel):
    name: str
    version: int
    uri: str


class ServiceView(BaseModel):
    name: str
    role: str
    learner: str | None
    cluster: str | None
    state: str
    reason: str | None
    restarts: int
    pid: int | None


class DeploymentView(BaseModel):
    """A model version that is served, in MLflow's scoring protocol and the Open Inference Protocol."""

    model: str
    version: int
    kind: str
    image: str | None
    state: str
    reason: str | None
    url: str | None


class ProjectView(BaseModel):
    id: str
    name: str
    owner: str
    team: str | None
    state: str
    reason: str | None
    created: float
    updated: float
    finished: float | None
    spec: dict[str, Any]
    source: str
    commit: str | None
    lock: str | None
    contract: str | None
    rounds_done: int
    rounds_total: int
    learners: list[LearnerView]
    clusters: list[ClusterView]
    metrics: dict[str, float | None] | None
    best_round: int | None
    model: ModelRef | None
    deployment: DeploymentView | None
    services: list[ServiceView]
    experiment_url: str | None


class ProjectSummary(BaseModel):
    """What one line shows of a project."""

    id: str
    name: str
    owner: str
    team: str | None
    state: str
    reason: str | None
    source: str
    created: float
    updated: float
    finished: float | None
    rounds_done: int
    rounds_total: int
    metrics: dict[str, float | None] | None
    best_round: int | None
    model: ModelRef | None


class ProjectList(BaseModel):
    projects: list[ProjectSummary]
    """The newest first."""
    next: str | None
    """Send it as ``after`` for the projects behind these; null: there are none."""


class EventView(BaseModel):
    project: str
    seq: int
    time: float
    kind: str
    data: dict[str, Any]


class EventList(BaseModel):
    events: list[EventView]


class Logs(BaseModel):
    logs: dict[str, str]


class FragmentView(BaseModel):
    id: str
    site: str
    tags: list[str]
    num_examples: int
    size_bytes: int
    columns: dict[str, str]
    allow_metrics: bool
    created: float
    content_hash: str
    labels: dict[str, str]
    node: str = ""
    """Of an orchestrator of many nodes, or one that joined; empty: this machine."""
    owner: str | None = None
    """Of a joined node: what it holds under the same tags is shown as one fragment."""


class DataUse(BaseModel):
    site: str
    learner: str
    project: str
    name: str
    owner: str
    state: str
    source: str
    commit: str | None
    image: str | None
    tags: list[str]
    created: float
    updates: int
    bytes_out: int


class DataUseList(BaseModel):
    uses: list[DataUse]


class FragmentList(BaseModel):
    fragments: list[FragmentView]


class DataTag(BaseModel):
    """What is held under one data tag."""

    tag: str
    sites: list[str]
    fragments: int
    num_examples: int
    size_bytes: int


class DataTagList(BaseModel):
    tags: list[DataTag]


class MockRequest(_Request):
    dataset: Literal["mnist", "digits"] = "mnist"
    tags: Annotated[list[str], Field(min_length=1, max_length=100)]
    sites: Annotated[int, Field(ge=1, le=10_000)] | Annotated[list[str], Field(min_length=1)] = 1
    """How many (they are called site-1, site-2, ...), or their names."""
    partition: Literal["iid", "dirichlet", "shards"] = "iid"
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    shards_per_site: Annotated[int, Field(ge=1, le=1000)] = 2
    test_split: bool = False
    """Spread the test examples too, under the tags TAG-test; both kinds then have a column ``split``."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    num_examples: Annotated[int, Field(ge=1)] | None = None


class ModelView(BaseModel):
    name: str
    version: int
    project: str
    round: int | None
    metrics: dict[str, float | None]
    created: float
    uri: str


class ModelList(BaseModel):
    models: list[ModelView]
    next: str | None
    """Send it as ``after`` for the models behind these; null: there are none."""


class ModelVersions(BaseModel):
    name: str
    versions: list[ModelView]


class ImageView(BaseModel):
    name: str
    digest: str
    platforms: list[str]
    size_bytes: int
    """Compressed; layers that images share count for each."""


class ImageList(BaseModel):
    images: list[ImageView]


class BaseImageRequest(_Request):
    suite: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = "bookworm"
    platforms: Annotated[list[str], Field(min_length=1, max_length=8)] = ["linux/amd64", "linux/arm64"]
    mirror: str | None = None
    refresh: bool = False


class Ui(BaseModel):
    url: str


class ShutdownRequest(_Request):
    force: bool = False
    """Stop projects that are not at their end."""


class Accepted(BaseModel):
    """The number of the last report that the manager has."""

    accepted: int


class ReportView(_Request):
    seq: Annotated[int, Field(ge=1)]
    time: float
    kind: str
    data: dict[str, Any] = {}


class Reports(_Request):
    source: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9/-]{0,254}$")]
    """``aggregator``: the root's; else a cluster's path."""
    reports: Annotated[list[ReportView], Field(max_length=10_000)]


class Stopping(BaseModel):
    status: Literal["stopping"] = "stopping"
