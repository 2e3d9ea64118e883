"""What we ask of a Docker Swarm, through the engine of one of its managers.

`Swarm` may be used from any thread and keeps no state; whoever changes things sees to the order.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from docker.errors import APIError

from flops.core.errors import FailedError, FlopsError, InvalidInputError, NotFoundError, UnavailableError
from flops.orchestration import swarm_objects as objects
from flops.orchestration.containers import Engine, Names
from flops.orchestration.deployments import Deployment
from flops.orchestration.port import ServiceSpec
from flops.orchestration.swarm_objects import Task

_log = logging.getLogger(__name__)

_LOG_LINES = 2000
_TRIES = 5
_ABSENT = ("unknown", "not found", "denied", "unauthorized", "authentication")


@dataclass(frozen=True)
class Sight:
    """All of ours at one moment.

    Args:
        services: their ids. tasks: by the ids of their services. nodes: of the swarm, in its words.
    """

    services: frozenset[str]
    tasks: Mapping[str, Sequence[Task]]
    nodes: Sequence[Mapping[str, Any]]


class Swarm:
    """One swarm, as far as the things of one FLOPS_HOME go. Errors are those of `Engine.asking`."""

    def __init__(self, engine: Engine, names: Names) -> None:
        self._engine = engine
        self._names = names

    @property
    def _api(self) -> Any:
        return self._engine.api

    def own_node(self) -> str:
        """The id of the engine's own node.

        Raises:
            FailedError: it is not a manager of a swarm.
        """
        with self._engine.asking("no service can run"):
            swarm: Mapping[str, Any] = self._api.info().get("Swarm") or {}
        state = swarm.get("LocalNodeState", "inactive")
        where = f"the Docker engine at {self._engine.url}"
        if state == "inactive":
            raise FailedError(
                f"{where} is in no swarm - 'docker swarm init' makes one, or name another engine"
            )
        if not swarm.get("ControlAvailable"):
            raise FailedError(
                f"{where} is not a manager of its swarm (it is {state}) - name the engine of one that is"
            )
        return str(swarm["NodeID"])

    def see(self) -> Sight:
        mine = self._names.mine()
        with self._engine.asking("nobody knows how services are"):
            # Services first: a task of one that is not listed yet belongs to nobody, and is asked for again.
            services = frozenset(service["ID"] for service in self._api.services(filters=mine))
            tasks: dict[str, list[Task]] = {}
            for value in self._api.tasks(filters=mine):
                task = Task.from_json(value)
                tasks.setdefault(task.service, []).append(task)
            return Sight(services, tasks, self._api.nodes())

    def nodes(self) -> Sequence[Mapping[str, Any]]:
        with self._engine.asking("the nodes are not known"):
            nodes: Sequence[Mapping[str, Any]] = self._api.nodes()
            return nodes

    # services
    def deployments(self) -> tuple[dict[str, Deployment], list[tuple[str, str]]]:
        """What is deployed, by the ids of services; and the ids of unreadable ones, with the reason."""
        with self._engine.asking("what is deployed is not known"):
            services = self._api.services(filters=self._names.mine())
        found: dict[str, Deployment] = {}
        broken: list[tuple[str, str]] = []
        for service in services:
            label = service["Spec"]["Labels"].get(objects.DEPLOYMENT)
            if label is None:
                continue  # a broom of `SwarmVolumes`
            try:
                found[service["ID"]] = objects.deployment_in(label)
            except (ValueError, KeyError, TypeError, AttributeError, FlopsError) as error:
                broken.append((service["ID"], f"{type(error).__name__}: {error}"))
        return found, broken

    def create(self, deployment: Deployment, template: Mapping[str, Any]) -> str:
        """The id of a new service."""
        with self._engine.asking(f"service {deployment.spec.name} cannot start"):
            created = self._api.create_service(
                dict(template),
                name=objects.name_of(self._names, deployment.spec.name),
                labels=objects.labels_of(self._names, deployment),
                mode=objects.ONE,
                update_config=objects.UPDATE,
                endpoint_spec=objects.NO_ADDRESS,
            )
            return str(created["ID"])

    def change(
        self,
        service: str,
        deployment: Deployment,
        template: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        what: str,
    ) -> None:
        """Write the deployment of a service, and the template that goes with it, in one step.

        Args:
            template: makes it of the present one.
            what: for the words of an error.
        """
        with self._engine.asking(f"service {deployment.spec.name} {what}"):
            for tries_left in reversed(range(_TRIES)):
                current = self._api.inspect_service(service)
                spec = current["Spec"]
                try:
                    self._api.update_service(
                        service,
                        current["Version"]["Index"],
                        task_template=dict(template(spec["TaskTemplate"])),
                        name=spec["Name"],
                        labels=objects.labels_of(self._names, deployment),
                        mode=objects.ONE,
                        update_config=objects.UPDATE,
                        endpoint_spec=objects.NO_ADDRESS,
                    )
                    return
                except APIError as error:
                    if "out of sequence" not in str(error) or not tries_left:
                        raise  # else Swarm itself wrote how the last update goes

    def delete(self, service: str) -> None:
        """No effect where there is none."""
        self._remove(lambda: self._api.remove_service(service))

    # what comes with services
    def template(
        self, spec: ServiceSpec, deployment: Deployment, place: objects.Place, stop_grace_s: float
    ) -> dict[str, Any]:
        """How a service runs; its files and its network are there from now on."""
        with self._engine.asking(f"service {spec.name} cannot start"):
            return objects.task_template(
                self._names,
                spec,
                deployment,
                place,
                secrets=self._put_files(spec),
                network="host" if spec.network == "project" else self._lonely_network(spec),
                stop_grace_s=stop_grace_s,
            )

    def _put_files(self, spec: ServiceSpec) -> dict[str, str]:
        if not spec.files:
            return {}
        secrets = self._api.secrets(filters=self._names.mine())
        there = {secret["Spec"]["Name"]: secret["ID"] for secret in secrets}
        ids: dict[str, str] = {}
        for file in spec.files:
            if not file.content:
                raise InvalidInputError(
                    f"file {file.name} of service {spec.name} is empty, and Swarm keeps no empty secrets"
                    " - leave it out"
                )
            name = objects.secret_name(self._names, spec, file)
            if name not in there:
                labels = self._names.labels(service=spec.name, project=spec.project)
                there[name] = self._api.create_secret(name, file.content, labels=labels)["ID"]
            ids[name] = there[name]
        return ids

    def _lonely_network(self, spec: ServiceSpec) -> str:
        name = objects.name_of(self._names, spec.name)
        for network in self._api.networks(names=[name]):
            if network["Name"] == name:
                return str(network["Id"])
        labels = self._names.labels(service=spec.name, project=spec.project)
        return str(self._api.create_network(name, driver="overlay", internal=True, labels=labels)["Id"])

    def collect(self) -> bool:
        """Remove files and networks of services that are no more, or have others by now; whether all went."""
        mine = self._names.mine()
        used: set[str] = set()
        with self._engine.asking("what services left cannot be removed"):
            for service in self._api.services(filters=mine):
                template = service["Spec"]["TaskTemplate"]
                used.update(secret["SecretID"] for secret in template["ContainerSpec"].get("Secrets") or [])
                used.update(network["Target"] for network in template.get("Networks") or [])
            secrets = {secret["ID"] for secret in self._api.secrets(filters=mine)} - used
            networks = {network["Id"] for network in self._api.networks(filters=mine)} - used
        gone = [self._try(partial(self._api.remove_secret, it)) for it in sorted(secrets)]
        gone += [self._try(partial(self._api.remove_network, it)) for it in sorted(networks)]
        return all(gone)

    def _try(self, remove: Callable[[], object]) -> bool:
        """Whether something is gone; what tasks still hold cannot go yet."""
        try:
            self._remove(remove)
        except UnavailableError:
            raise
        except FlopsError as error:
            _log.debug("%s", error)
            return False
        return True

    def _remove(self, remove: Callable[[], object]) -> None:
        try:
            with self._engine.asking("it cannot be removed"):
                remove()
        except NotFoundError:
            return

    # what is told of services
    def printed(self, service: str, name: str, tail_bytes: int) -> bytes:
        """What all attempts of a service printed, at least the last ``tail_bytes``."""
        log = b""
        try:
            with self._engine.asking(f"the log of service {name} cannot be read"):
                tasks = [Task.from_json(value) for value in self._api.tasks(filters={"service": service})]
                for tail in (_LOG_LINES, "all"):
                    messages = self._api.service_logs(
                        service, details=True, stdout=True, stderr=True, tail=tail, is_tty=False
                    )
                    log = objects.log_of(messages, tasks)
                    if len(log) >= tail_bytes or log.count(b"\n") < _LOG_LINES:
                        break
        except NotFoundError:
            pass
        return log

    def why_no_image(self, image: str) -> FlopsError:
        """Nodes do not tell why they have no image: its registry may."""
        try:
            with self._engine.asking(f"image {image} cannot be pulled"):
                found = self._api.inspect_distribution(image)
        except FlopsError as error:
            if any(word in str(error).lower() for word in _ABSENT):
                return FailedError(str(error))
            return UnavailableError(str(error))
        made_for = sorted({f"{p.get('os')}/{p.get('architecture')}" for p in found.get("Platforms") or []})
        return FailedError(
            f"image {image} is in its registry, for {', '.join(made_for) or 'no platform'}, and its node"
            " could not pull it - build it for that node's platform, and see the engine's log there"
        )
