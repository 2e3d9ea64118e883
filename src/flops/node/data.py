"""The node's own data server, and what of its data others are told: sites, allowed tags, counts."""

import logging
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from flops.core.consent import Consent
from flops.core.errors import FlopsError, UnavailableError
from flops.core.ids import ServiceName
from flops.data import DataClient, Fragment
from flops.data.listening import unix_location
from flops.images.locks import write_atomically
from flops.node.home import NodeHome
from flops.orchestration import Orchestrator, ServiceSpec, deploy_in_place

log = logging.getLogger(__name__)

OWN = "flops"
"""The project of the node's own services; no project of a manager is called so."""
_SERVER = ServiceName("flops-data")
_MAX_WORD = 200
_LOOK_AGAIN_S = 0.05
_MAX_HOLDINGS = 5000


class NodeData:
    """Keeps the data server running, and asks it. Safe from any thread."""

    def __init__(self, home: NodeHome, orchestrator: Orchestrator) -> None:
        self._home = home
        self._orchestrator = orchestrator
        self._lock = threading.Lock()
        self._client: DataClient | None = None
        self._last: list[Fragment] = []

    @property
    def location(self) -> str:
        return unix_location(self._home.settings.data_socket)

    def token(self) -> str:
        return data_token(self._home)

    def ensure(self) -> None:
        """The data server is deployed; it answers soon.

        Raises:
            FlopsError: it cannot be.
        """
        self.token()
        settings = self._home.settings
        command = [sys.executable, "-P", "-m", "flops.data.server", "--root", str(settings.data_dir)]
        command += ["--socket", str(settings.data_socket), "--token-file", str(self._home.data_token_file)]
        command += ["--ready-file", str(self._home.data_ready_file)]
        spec = ServiceSpec(
            name=_SERVER,
            command=tuple(command),
            role="data",
            project=OWN,
            directory=settings.run_dir,
            restart="on-failure",
            max_restarts=1_000_000,
        )
        deploy_in_place(self._orchestrator, spec)

    def wait_until_ready(self, over: threading.Event, timeout_s: float) -> None:
        """Wait for the data server to answer, but no longer than that, nor once ``over`` is set."""
        deadline = time.monotonic() + timeout_s
        while not self._home.data_ready_file.exists() and time.monotonic() < deadline:
            if over.wait(_LOOK_AGAIN_S):
                return

    def holdings(self, consent: Consent) -> list[dict[str, Any]]:
        """What the manager is told: counts by site and tags; those of last time while the server is away."""
        with self._lock:
            if self._client is None:
                self._client = DataClient(self.location, self.token(), timeout_s=10.0)
            try:
                self._last = self._client.list()
            except UnavailableError as error:
                log.info("the data server does not answer: %s", error)
            except FlopsError as error:
                log.warning("what the data server holds cannot be asked: %s", error)
            return holdings_of(self._last, consent)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None


def holdings_of(fragments: Sequence[Fragment], consent: Consent) -> list[dict[str, Any]]:
    """Counts of what carries an allowed tag, by site, tags and what else is said of it; nothing else."""
    found: dict[Any, dict[str, Any]] = {}
    for fragment in fragments:
        tags = [tag for tag in consent.shown(fragment.tags) if len(tag) <= _MAX_WORD]
        if not tags:
            continue
        labels = {name: value for name, value in sorted(fragment.labels.items()) if value}
        key = (fragment.site, *tags, fragment.allow_metrics, *labels.items())
        holding = found.setdefault(
            key,
            {
                "site": fragment.site,
                "tags": tags,
                "num_examples": 0,
                "size_bytes": 0,
                "allow_metrics": fragment.allow_metrics,
                "labels": labels,
            },
        )
        holding["num_examples"] += fragment.num_examples
        holding["size_bytes"] += fragment.size_bytes
    if len(found) > _MAX_HOLDINGS:
        log.warning("%d of %d holdings are told to the manager", _MAX_HOLDINGS, len(found))
    return list(found.values())[:_MAX_HOLDINGS]


def data_token(home: NodeHome) -> str:
    """The token of the node's data server; made at the first call."""
    try:
        return home.data_token_file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        write_atomically(home.data_token_file, secrets.token_urlsafe(32))
        return home.data_token_file.read_text(encoding="ascii").strip()
