"""What images need before a project's services can run on an orchestrator's nodes: an image registry that
they pull from, the image of FLOps' own programs, and on every node a data server.

The data servers are services of the same orchestrator. What they hold lies in a volume of their node, which
outlives them and this manager; only the owner of a node removes it.
"""

import hashlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops.core.errors import UnavailableError
from flops.core.ids import ServiceName
from flops.core.settings import Settings
from flops.manager.grounds import (
    DATA_RUN,
    DATA_RUN_VOLUME,
    DATA_SOCKET,
    RUNTIME_PYTHON,
)
from flops.manager.paths import data_token_file, read_or_make_token
from flops.manager.ports import Ports
from flops.manager.sources import Source
from flops.manager.support import OWNER
from flops.orchestration import (
    SECRETS,
    File,
    Node,
    Orchestrator,
    ServiceSpec,
    ServiceStatus,
    Volume,
    deploy_in_place,
)

if TYPE_CHECKING:
    from flops.manager.authority import Authority

log = logging.getLogger(__name__)

DATA = "data"
_DATA_VOLUME = "flops-data"
_DATA_FOLDER = "/var/lib/flops"
_READY_TIMEOUT_S = 120.0
_LOOK_AGAIN_S = 0.1
_CONNECT_TIMEOUT_S = 2.0


class Nodes:
    """Keeps what nodes need running. Safe from any thread.

    Args:
        runtime_image: the reference of an image with FLOps' own programs; made at the first call.
    """

    def __init__(
        self,
        settings: Settings,
        orchestrator: Orchestrator,
        authority: "Authority",
        ports: Ports,
        runtime_image: Callable[[], str],
    ) -> None:
        self._settings = settings
        self._orchestrator = orchestrator
        self._authority = authority
        self._runtime_image = runtime_image
        self._ports = ports
        self._lock = threading.Lock()
        self._proving = threading.Lock()
        self._proof_files: tuple[Path, Path] | None = None

    def ensure(self) -> None:
        """A data server runs on every node that is ready.

        Raises:
            UnavailableError: there is no such node, or a data server does not get ready.
        """
        with self._lock:
            nodes = self._ready()
            image = self._runtime_image()
            for node in nodes:
                deploy_in_place(self._orchestrator, self._data_server(node, image))
        deadline = time.monotonic() + _READY_TIMEOUT_S
        for node in nodes:
            self._wait(_name(node), deadline)

    def sources(self) -> list[dict[str, Any]]:
        """How the data servers are reached from this machine: fields of `Source`."""
        statuses = {status.name: status for status in self._orchestrator.list(OWNER)}
        found = []
        authority, (cert, key) = self._authority.certificate_file, self._proof
        for node in self._ready():
            status = statuses.get(_name(node))
            if status is not None and status.endpoint is not None:
                location = f"grpc+tls://{status.endpoint}"
                found.append(asdict(Source(node.name, location, str(authority), str(cert), str(key))))
        return found

    @property
    def _proof(self) -> tuple[Path, Path]:
        """Files with which the manager proves itself to data servers; its own, and renewed in time."""
        from flops.manager.authority import DAYS_OF_SERVICE, days_left

        with self._proving:
            files = self._proof_files
            if files is None or days_left(files[0].read_text(encoding="ascii")) < DAYS_OF_SERVICE / 2:
                files = self._authority.issue_files("data-client", "FLOps manager", client=True)
                self._proof_files = files
        return files

    def stop(self) -> None:
        """No data server is left; what they hold is."""
        live = [status.name for status in self._orchestrator.list(OWNER) if status.live]
        self._orchestrator.stop_many(live, grace_s=3.0)

    def _ready(self) -> Sequence[Node]:
        nodes = [node for node in self._orchestrator.nodes() if node.ready]
        if not nodes:
            raise UnavailableError("the orchestrator has no node that is ready - add one, or see to it")
        return nodes

    def _data_server(self, node: Node, image: str) -> ServiceSpec:
        name = _name(node)
        port = self._ports.of(name)
        token = read_or_make_token(data_token_file(self._settings))
        certificate = self._authority.issue_once(
            self._settings.authority_dir / f"{name}.json", name, [node.address, "127.0.0.1"]
        )
        return ServiceSpec(
            name=name,
            command=(
                *(RUNTIME_PYTHON, "-P", "-m", "flops.data.server"),
                *("--root", f"{_DATA_FOLDER}/data", "--socket", DATA_SOCKET),
                *("--token-file", f"{SECRETS}/token"),
                *("--listen", f"grpc+tls://0.0.0.0:{port}"),
                *("--tls-cert", f"{SECRETS}/cert.pem", "--tls-key", f"{SECRETS}/key.pem"),
                *("--tls-ca", f"{SECRETS}/ca.pem"),
            ),
            role=DATA,
            project=OWNER,
            image=image,
            files=(
                File("token", token.encode()),
                File("cert.pem", certificate.certificate.encode()),
                File("key.pem", certificate.key.encode()),
                File("ca.pem", self._authority.certificate.encode()),
            ),
            volumes=(Volume(_DATA_VOLUME, _DATA_FOLDER), Volume(DATA_RUN_VOLUME, DATA_RUN)),
            node=node.name,
            port=port,
            publish=True,
            restart="on-failure",
            max_restarts=1_000_000,  # it is needed for as long as the manager is
        )

    def _wait(self, name: ServiceName, deadline: float) -> None:
        """Until a data server proves itself where it is published."""
        while True:
            status = self._status(name)
            if status is not None and status.endpoint is not None and self._answers(status.endpoint):
                return
            if time.monotonic() > deadline or status is None or not status.live:
                lines = [line for line in self._orchestrator.logs(name, 4096).splitlines() if line.strip()]
                why = (status.reason if status is not None else "") or "it does not get ready"
                last = f": {lines[-1]}" if lines else ""
                raise UnavailableError(f"the data server {name} cannot be used, {why}{last}")
            time.sleep(_LOOK_AGAIN_S)

    def _answers(self, endpoint: str) -> bool:
        """Whether TLS is spoken there: engines take connections for services that do not listen yet."""
        host, _, port = endpoint.rpartition(":")
        host = host.strip("[]")
        context = ssl.create_default_context(cadata=self._authority.certificate)
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(*self._proof)
        try:
            with (
                socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=host),
            ):
                return True
        except OSError:
            return False

    def _status(self, name: ServiceName) -> ServiceStatus | None:
        return next((one for one in self._orchestrator.list(OWNER) if one.name == name), None)


def _name(node: Node) -> ServiceName:
    """Node names may be long, and hold what no service's may."""
    return ServiceName(f"flops-data-{hashlib.sha256(node.name.encode()).hexdigest()[:8]}")
