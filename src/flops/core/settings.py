"""Settings: where FLOps keeps its things, what it works with; read once from the environment; no I/O."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flops.core.issuer import IssuerSettings

# sun_path of a Unix socket holds 108 bytes; the longest name below run_dir stays under 60.
_LONGEST_RUN_DIR = 47

ORCHESTRATORS = ("process", "docker", "swarm")


@dataclass(frozen=True)
class Settings:
    """The lay-out of one FLOPS_HOME, and what the operator configured.

    One FLOPS_HOME belongs to one manager (kept by a lock file), or to those that share its PostgreSQL, one of
    which acts; everything FLOps stores is below it.
    """

    home: Path
    tracking_uri: str | None = None
    """An MLflow tracking URI; None: SQLite and a folder below ``home``."""
    port: int = 0
    """Port of the manager's REST API on loopback; 0: the last one used, else any free one."""
    listen: str | None = None
    """Address (``HOST[:PORT]``) at which the REST API answers other machines as well, over TLS; None: this
    machine alone."""
    names: tuple[str, ...] = ()
    """Names by which other machines call it, besides that address."""
    max_running: int = 20
    """Projects that run at the same time; more wait for their turn."""
    orchestrator: str | None = None
    """What runs projects' services: one of `ORCHESTRATORS`; None: that of last time, else ``process``."""
    docker_host: str | None = None
    """Of `docker` and `swarm`: where the engine answers; None: its usual socket."""
    advertise: str | None = None
    """Address at which services on other machines reach this one; None: what the orchestrator says."""
    registry: str | None = None
    """Image registry, ``HOST[:PORT][/PREFIX]``, with ``http://`` in front where it speaks plain HTTP; None:
    our own on this machine, where it is installed."""
    base_image: str | None = None
    """What images are built on; may hold ``{python}``, such as 3.12. None: Python's image of the public
    hub, or a base made here."""
    database_url: str | None = field(default=None, repr=False)
    """``postgresql://USER:PASSWORD@HOST:PORT/DATABASE``, never shown; None: SQLite below ``home``."""
    issuer: IssuerSettings | None = None
    """Who people may sign in with, besides tokens; None: nobody."""

    standby: bool = False
    """Whether a manager waits until the one that acts on the same ``database_url`` has ended, and then takes
    over."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Raises: ValueError: a variable cannot be understood."""
        home = environment.get("FLOPS_HOME")
        orchestrator = environment.get("FLOPS_ORCHESTRATOR") or None
        if orchestrator not in (None, *ORCHESTRATORS):
            raise ValueError(
                f"FLOPS_ORCHESTRATOR is '{orchestrator[:40]}' - use one of {', '.join(ORCHESTRATORS)}"
            )
        port = environment.get("FLOPS_PORT") or "0"
        running = environment.get("FLOPS_MAX_RUNNING") or str(cls.max_running)
        for name, value in (("FLOPS_PORT", port), ("FLOPS_MAX_RUNNING", running)):
            if not value.isdecimal() or len(value) > 9:
                raise ValueError(f"{name} must be a number (is '{value[:40]}')")
        standby = environment.get("FLOPS_STANDBY") or "0"
        if standby not in ("0", "1"):
            raise ValueError(f"FLOPS_STANDBY is '{standby[:40]}' - use 1, or leave it out")
        if int(running) == 0:
            raise ValueError("FLOPS_MAX_RUNNING is 0 - one project must be able to run")
        return cls(
            home=Path(home).expanduser().absolute() if home else Path.home() / ".flops",
            tracking_uri=environment.get("FLOPS_TRACKING_URI") or None,
            port=int(port),
            max_running=int(running),
            listen=environment.get("FLOPS_LISTEN") or None,
            names=tuple(name for name in environment.get("FLOPS_NAMES", "").split(",") if name),
            orchestrator=orchestrator,
            docker_host=environment.get("DOCKER_HOST") or None,
            advertise=environment.get("FLOPS_ADVERTISE") or None,
            registry=environment.get("FLOPS_REGISTRY") or None,
            base_image=environment.get("FLOPS_BASE_IMAGE") or None,
            database_url=environment.get("FLOPS_DATABASE") or None,
            standby=standby == "1",
            issuer=IssuerSettings.from_environment(environment),
        )

    # files of the manager
    @property
    def database(self) -> Path:
        """SQLite's file, without a ``database_url``."""
        return self.home / "manager.db"

    @property
    def lock_file(self) -> Path:
        return self.home / "manager.lock"

    @property
    def address_file(self) -> Path:
        """JSON ``{"url", "pid"}`` of the running manager."""
        return self.home / "manager.json"

    @property
    def standby_dir(self) -> Path:
        """An address file like that for each manager that stands by."""
        return self.home / "standby"

    @property
    def token_file(self) -> Path:
        """The local API token, mode 600."""
        return self.home / "token"

    # folders
    @property
    def projects_dir(self) -> Path:
        return self.home / "projects"

    @property
    def environments_dir(self) -> Path:
        return self.home / "environments"

    @property
    def locks_dir(self) -> Path:
        return self.home / "locks"

    @property
    def containers_dir(self) -> Path:
        """What a Docker orchestrator knows of its services."""
        return self.home / "containers"

    @property
    def images_dir(self) -> Path:
        """Our images, as an OCI image layout."""
        return self.home / "images"

    @property
    def registry_dir(self) -> Path:
        """What the image registry of our own keeps."""
        return self.home / "registry"

    @property
    def authority_dir(self) -> Path:
        """The key and the certificate that prove who is who among services on other machines."""
        return self.home / "authority"

    @property
    def datasets_dir(self) -> Path:
        """Known data sets (MNIST, digits), fetched once."""
        return self.home / "datasets"

    @property
    def data_dir(self) -> Path:
        """Fragments held by this node's data server."""
        return self.home / "data"

    @property
    def spool_dir(self) -> Path:
        """Tracking records on their way to MLflow."""
        return self.home / "spool"

    @property
    def services_dir(self) -> Path:
        """State of the `process` orchestrator."""
        return self.home / "services"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def mlflow_uri(self) -> str:
        return self.tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def mlflow_artifacts_dir(self) -> Path:
        return self.home / "mlartifacts"

    @property
    def run_dir(self) -> Path:
        """Sockets (mode 700). Outside ``home`` where its path is too long for a Unix socket."""
        inside = self.home / "run"
        if len(str(inside)) <= _LONGEST_RUN_DIR:
            return inside
        digest = hashlib.sha256(str(self.home).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"flops-{os.getuid()}-{digest}"

    @property
    def manager_socket(self) -> Path:
        """Where services of this machine report to the manager."""
        return self.run_dir / "manager.sock"

    @property
    def data_socket(self) -> Path:
        return self.run_dir / "data.sock"
