"""An orchestrator that asks before each effect whether its manager may still act."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from flops.core.errors import FailedError
from flops.core.ids import ServiceName
from flops.orchestration.port import (
    Node,
    Orchestrator,
    ServiceSpec,
    ServiceUsage,
    Statuses,
    Subscription,
    Watcher,
)


class PermittedOrchestrator:
    """See `Orchestrator`; whatever changes something is refused where ``check`` raises, before it is done.

    Args:
        check: raises what the callers of this manager wait for without end.
    """

    def __init__(self, inner: Orchestrator, check: Callable[[], None]) -> None:
        self._inner = inner
        self._check = check

    @property
    def runs_images(self) -> bool:
        return self._inner.runs_images

    @property
    def host(self) -> str:
        return self._inner.host

    def address(self, spec: ServiceSpec) -> str:
        return self._inner.address(spec)

    def expect(self, image: str) -> None:
        with suppress(Exception):  # a hint
            self._check()
            self._inner.expect(image)

    def deploy(self, spec: ServiceSpec) -> None:
        self._check()
        self._inner.deploy(spec)

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        self._check()
        try:
            self._inner.stop_many(names, grace_s)
        except FailedError:
            self._check()  # whoever may not act sees no ends either
            raise

    def remove(self, name: ServiceName) -> None:
        self._check()
        self._inner.remove(name)

    def list(self, project: str | None = None) -> Statuses:
        return self._inner.list(project)

    def watch(self, callback: Watcher) -> Subscription:
        return self._inner.watch(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        return self._inner.logs(name, tail_bytes)

    def remove_project(self, project: str) -> None:
        self._check()
        self._inner.remove_project(project)

    def nodes(self) -> Sequence[Node]:
        return self._inner.nodes()

    def usage(self) -> Sequence[ServiceUsage]:
        return self._inner.usage()

    def close(self) -> None:
        self._inner.close()
