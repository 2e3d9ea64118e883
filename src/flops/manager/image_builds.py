"""Where images of projects are built and kept: what the steps that build them are told, and the image
registry of our own, which runs for as long as images are needed.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from flops.core.errors import UnavailableError
from flops.core.ids import ServiceName
from flops.core.settings import Settings
from flops.manager.ports import Ports, is_free
from flops.manager.states import RUNTIME_IMAGE
from flops.manager.support import OWNER
from flops.orchestration import Orchestrator, ServiceSpec, deploy_in_place

_REGISTRY = ServiceName("flops-registry")


class ImageBuilds:
    """Safe from any thread.

    Args:
        programs: runs programs of this machine.
        orchestrator: runs projects' services.
        run: one step outside of a project: its name, its arguments; answers its result.
    """

    def __init__(
        self,
        settings: Settings,
        programs: Orchestrator,
        orchestrator: Orchestrator,
        ports: Ports,
        run: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self._settings = settings
        self._programs = programs
        self._orchestrator = orchestrator
        self._run = run
        self._ports = ports
        self._lock = threading.Lock()
        self._runtime: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What steps that build images have to know: where they are pushed to, what they are built on, and
        which platforms nodes have.

        Raises:
            UnavailableError: nodes need an image registry, and there is none.
        """
        registry = self._settings.registry or self._own_registry()
        if registry is None and self._orchestrator.runs_images:
            raise UnavailableError(
                "nodes have no image registry to pull from - install Debian's docker-registry on this "
                "machine, or name one in FLOPS_REGISTRY"
            )
        nodes = self._orchestrator.nodes() if self._orchestrator.runs_images else ()
        return {
            "registry": registry,
            "base_image": self._settings.base_image,
            "platforms": sorted({node.platform for node in nodes if node.ready}),
        }

    def runtime_image(self) -> str:
        """The reference of the image with FLOps' own programs; built at the first call."""
        with self._lock:
            if self._runtime is None:
                self._runtime = str(self._run(RUNTIME_IMAGE, self.arguments())["image"])
            return self._runtime

    def _own_registry(self) -> str | None:
        """The address of our own registry, started where it does not run; None: it is not installed."""
        from flops.images.registry_service import registry_command, registry_installed

        if not registry_installed():
            return None
        # Engines of other nodes reach it where they reach this machine; one on this machine takes loopback,
        # where no engine asks for TLS.
        host = self._orchestrator.host if self._settings.orchestrator == "swarm" else "127.0.0.1"
        port = self._ports.of(_REGISTRY, is_free=is_free)
        command, environment = registry_command(self._settings.registry_dir, host, port)
        spec = ServiceSpec(
            name=_REGISTRY,
            command=tuple(command),
            environment=environment,
            role="registry",
            project=OWNER,
            directory=self._settings.run_dir,
            restart="on-failure",
            max_restarts=1_000_000,  # it is needed for as long as the manager is
        )
        deploy_in_place(self._programs, spec)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
