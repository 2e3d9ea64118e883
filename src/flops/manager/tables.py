"""The manager's tables. Change them together with a new file in ``persistence/migrations/versions``.

What is asked for most often is kept where it is read in one row (``projects``); what grows with a run has a
table of its own. Tokens are never stored here: they live in files of mode 600 below
``projects/<id>/config``.
"""

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    Integer,
    String,
    Table,
    Text,
)

from flops.persistence import JSON, metadata


def _project(primary: bool = True) -> Column[str]:
    return Column(
        "project",
        String(16),
        ForeignKey("projects.id", ondelete="CASCADE"),
        primary_key=primary,
        nullable=False,
    )


projects = Table(
    "projects",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("reason", Text),
    Column("spec", JSON, nullable=False),
    Column("source", Text, nullable=False),
    Column("created", Float, nullable=False, index=True),
    Column("updated", Float, nullable=False),
    Column("finished", Float),
    # The last event's number: read and raised in the transaction that adds the event.
    Column("last_seq", Integer, nullable=False, default=0),
    # Up to where events have been handed to the tracking spool.
    Column("spooled_seq", Integer, nullable=False, default=0),
    # What the aggregator said at its end: {"outcome": "finished" | "failed", ...}.
    Column("training", JSON),
    Column("rounds_done", Integer, nullable=False, default=0),
    Column("rounds_total", Integer, nullable=False),
    Column("metrics", JSON),
    Column("best_round", Integer),
    # The recorder's word on the run: {"run_id", "experiment_id", ...}.
    Column("tracking", JSON),
    # False while services of the project may still be there.
    Column("cleaned", Boolean, nullable=False, default=False),
    # A user's name, and the team that shares it, if one does.
    Column("owner", String(60), nullable=False, server_default="admin"),
    Column("team", String(60)),
    # Id of the request that set it in motion last.
    Column("request", String(64)),
)

steps = Table(
    "steps",
    metadata,
    _project(),
    Column("name", String(40), primary_key=True),
    Column("started", Float, nullable=False),
    Column("finished", Float),
    Column("result", JSON),
)

services = Table(
    "services",
    metadata,
    _project(),
    Column("name", String(60), primary_key=True),
    Column("role", String(20), nullable=False),
    Column("learner", String(60)),
    # Whose aggregator it is; None: the root's, or no aggregator.
    Column("cluster", String(255)),
    Column("restarts", Integer, nullable=False, default=0),
    # Why it is over for good; None while it is wanted.
    Column("over", Text),
)

learners = Table(
    "learners",
    metadata,
    _project(),
    Column("learner", String(60), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("site", String(200), nullable=False),
    Column("cluster", String(255)),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    # The one that holds the site's data; empty: this machine.
    Column("node", String(200), nullable=False, server_default=""),
)

# Of a hierarchy, those that lie in others too: "europe/north" in "europe".
clusters = Table(
    "clusters",
    metadata,
    _project(),
    Column("cluster", String(255), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    # Over all cycles.
    Column("rounds_done", Integer, nullable=False, default=0),
)

rounds = Table(
    "rounds",
    metadata,
    _project(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("finished", Float, nullable=False),
    Column("data", JSON, nullable=False),
)

events = Table(
    "events",
    metadata,
    _project(),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("data", JSON, nullable=False),
)

report_sources = Table(
    "report_sources",
    metadata,
    _project(),
    Column("source", String(255), primary_key=True),
    Column("last_seq", Integer, nullable=False),
)

# A served model version; it outlives neither its project nor its model.
deployments = Table(
    "deployments",
    metadata,
    _project(),
    Column("model", String(200), nullable=False),
    Column("version", Integer, nullable=False),
    # How it is loaded: "mlflow" or "onnx", and why not the other.
    Column("kind", String(16), nullable=False),
    Column("image", Text),
    Column("created", Float, nullable=False),
    Column("stopped", Boolean, nullable=False),
)

# No foreign key: a registered model is the user's and outlives its project.
models = Table(
    "models",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("project", String(16), nullable=False, index=True),
    Column("round", Integer),
    Column("metrics", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("uri", Text, nullable=False),
    Column("folder", Text),
    # Of its project, which may be forgotten before it.
    Column("owner", String(60), nullable=False, server_default="admin"),
    Column("team", String(60)),
)

# Of the manager's own nodes; see `flops.manager.ownership`.
sites = Table(
    "sites",
    metadata,
    Column("site", String(200), primary_key=True),
    Column("owner", String(60), nullable=False, index=True),
    Column("created", Float, nullable=False),
)

# Of creating requests that brought an Idempotency-Key; see `flops.manager.once`.
answers = Table(
    "answers",
    metadata,
    # A user's name: keys of different users never meet.
    Column("caller", String(60), primary_key=True),
    Column("key", String(200), primary_key=True),
    # SHA-256 of the request: the same key with another one is a mistake.
    Column("request", String(64), nullable=False),
    # The id that the request's project gets; known before the project is there.
    Column("project", String(16), nullable=False),
    Column("created", Float, nullable=False, index=True),
    # None: the request is being carried out, or was cut off.
    Column("answer", JSON),
)
