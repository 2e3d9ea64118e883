"""One orchestrator of two: services that name a joined node go there, all others to the base."""

from collections.abc import Iterable, Sequence

from flops.core.ids import ServiceName
from flops.manager.joined import JoinedNodes
from flops.orchestration import Node, Orchestrator, ServiceSpec, ServiceUsage, Subscription
from flops.orchestration.port import Statuses, Watcher


class Placing:
    """See `Orchestrator`. Joined nodes run programs only, whatever the base runs.

    Args:
        base: runs all that names none of the joined nodes.
    """

    def __init__(self, base: Orchestrator, joined: JoinedNodes) -> None:
        self._base = base
        self._joined = joined

    @property
    def runs_images(self) -> bool:
        return self._base.runs_images

    @property
    def host(self) -> str:
        return self._base.host

    def address(self, spec: ServiceSpec) -> str:
        return self._base.address(spec)

    def expect(self, image: str) -> None:
        self._base.expect(image)

    def deploy(self, spec: ServiceSpec) -> None:
        if spec.image is None and spec.node is not None:
            self._joined.deploy(spec)
        else:
            self._base.deploy(spec)

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self._of(name).stop(name, grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        wanted = list(names)
        far = {status.name for status in self._joined.list()}.intersection(wanted)
        # The base knows all others or refuses, before anything is stopped.
        self._base.stop_many([name for name in wanted if name not in far], grace_s)
        if far:
            self._joined.stop_many(sorted(far), grace_s)

    def remove(self, name: ServiceName) -> None:
        self._of(name).remove(name)

    def list(self, project: str | None = None) -> Statuses:
        both = [*self._base.list(project), *self._joined.list(project)]
        return sorted(both, key=lambda status: status.name)

    def watch(self, callback: Watcher) -> Subscription:
        return _Both(self._base.watch(callback), self._joined.watch(callback))

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        return self._of(name).logs(name, tail_bytes)

    def remove_project(self, project: str) -> None:
        self._joined.remove_project(project)
        self._base.remove_project(project)

    def nodes(self) -> Sequence[Node]:
        """The base's: what joined ones are is more than an orchestrator knows (`JoinedNodes.store`)."""
        return self._base.nodes()

    def usage(self) -> Sequence[ServiceUsage]:
        return [*self._base.usage(), *self._joined.usage()]

    def close(self) -> None:
        self._joined.close()
        self._base.close()

    def _of(self, name: ServiceName) -> Orchestrator:
        far = any(status.name == name for status in self._joined.list())
        return self._joined if far else self._base


class _Both:
    """Two subscriptions as one."""

    def __init__(self, *subscriptions: Subscription) -> None:
        self._subscriptions = subscriptions

    def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.close()
