"""The grounds that a project's services run on: where each finds its files, and where it finds the others.

Programs of this machine share its files and meet at Unix sockets. Images run on machines of their own: their
code and models are in the image, their configuration travels with them, they meet over TLS under this
manager's own authority, and what one learner's agent and its worker, or the agents and the data server of a
node, have in common is a volume.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flops.core.errors import UnavailableError
from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.core.settings import Settings
from flops.core.spec import ProjectSpec
from flops.federation import ReportTo
from flops.federation.config import Tls
from flops.manager.code_archive import code_of
from flops.manager.image_steps import INITIAL_MODEL_FILE
from flops.manager.joined import ASSIGNMENT
from flops.manager.paths import ProjectPaths, read_or_make_token, write_private
from flops.manager.ports import Ports, is_free
from flops.manager.rows import Deployment, Learner, Service
from flops.manager.states import AGGREGATOR_IMAGE, DATA, EXPORT_ENVIRONMENT, IMAGES, ONNX
from flops.orchestration import SECRETS, File, Node, Orchestrator, ServiceSpec, Volume
from flops.orchestration.port import LOOPBACK
from flops.serving.config import ServingConfig, ServingTls, serving_command

if TYPE_CHECKING:
    from flops.manager.authority import Authority
    from flops.manager.store import Store

AGGREGATOR = "aggregator"
AGENT = "agent"
WORKER = "worker"
MODEL = "model"
"""Serves a trained model; outlives the training."""
_PROGRAMS = {AGGREGATOR: "flops.federation.aggregator", AGENT: "flops.agent", MODEL: "flops.serving"}
_NICE = {AGGREGATOR: 11, AGENT: 13, WORKER: 13}
"""Training steps aside for the manager, for served models and for whoever else uses the machine, all of whom
twenty projects at once would otherwise leave a few percent of a processor."""
_MODEL_RESTARTS = 1_000_000
"""A model is served for as long as its user wants it."""

RUNTIME_PYTHON = "/opt/flops/bin/python"
"""The interpreter of FLOps' own programs in an image."""
USER_PYTHON = "/opt/user/bin/python"
"""The interpreter of the user's code in an image."""
_CODE = "/code"
_MODEL = "/model"
_STATE = "/var/lib/flops"
_SEAT = "/run/flops/seat"
ANY_HOST = "manager.invalid"
"""Stands for this machine in what joined nodes are told: each puts in how it calls us itself."""
DATA_RUN = "/run/flops/data"
DATA_SOCKET = f"{DATA_RUN}/data.sock"
DATA_RUN_VOLUME = "flops-data-run"
_CA, _PROJECT_CA, _CERTIFICATE, _KEY, _TOKEN = "ca.pem", "project-ca.pem", "cert.pem", "key.pem", "token"
AUTHORITY_FILE = f"{SECRETS}/{_CA}"
_PROJECT_TLS = Tls(cert=f"{SECRETS}/{_CERTIFICATE}", key=f"{SECRETS}/{_KEY}", ca=f"{SECRETS}/{_PROJECT_CA}")
"""Of all services of a project alike."""


@dataclass(frozen=True)
class Quarters:
    """What an aggregator is told about the place where it runs."""

    listen: str
    initial_model: str
    state_dir: str
    report: ReportTo
    tls: Tls | None = None


@dataclass(frozen=True)
class Access:
    """How a served model is spoken to.

    Args:
        ca: PEM text of the authority of its certificate; None: it speaks plain HTTP.
        token: that it wants to see; None: none.
    """

    ca: str | None = None
    token: str | None = None

    @property
    def scheme(self) -> str:
        return "http" if self.ca is None else "https"


class Ground(Protocol):
    """One kind of ground; the same answers each time it is asked about the same project."""

    def aggregator(self, project: ProjectId, number: int | None, token: str) -> Quarters:
        """Where an aggregator runs: a cluster's by its number, None the root's."""
        ...

    def location(self, project: ProjectId, number: int | None, *, joined: bool = False) -> str:
        """Where its members connect.

        Args:
            joined: those on joined nodes.
        """
        ...

    def members_tls(self, project: ProjectId, member: str) -> Tls | None:
        """What one of its members trusts, and proves itself with.

        Args:
            member: a learner, or the name of an aggregator's service.
        """
        ...

    def data(self) -> str:
        """Where agents find the data server of their node."""
        ...

    def is_joined(self, learner: Learner) -> bool:
        """Whether it is on a joined node: a machine that completes the configuration of its agent by itself,
        with its own paths, its own data server and its own name for this machine."""
        ...

    def agent(
        self, project: ProjectId, name: LearnerId, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What the configuration of an agent, on no joined node, says about its worker."""
        ...

    def specification(
        self,
        project: ProjectId,
        spec: ProjectSpec,
        service: Service,
        learners: Mapping[str, Learner],
        results: Mapping[str, Mapping[str, Any]],
    ) -> ServiceSpec:
        """What the orchestrator runs."""
        ...

    def model(
        self, deployment: Deployment, folder: str, results: Mapping[str, Mapping[str, Any]]
    ) -> ServiceSpec:
        """What serves a trained model; its configuration is written here.

        Args:
            folder: of the model on this machine.
        """
        ...

    def access(self, project: ProjectId) -> Access:
        """How the project's served model is spoken to."""
        ...

    def needs_certificate(self, project: ProjectId, service: Service) -> bool:
        """Whether a service's certificate is over soon; it gets a new one with its next `specification`, and
        reads it when it starts.
        """
        ...

    def model_needs_certificate(self, project: ProjectId) -> bool:
        """The same of the project's served model, and `model`."""
        ...

    def release(self, project: ProjectId) -> None:
        """The project is forgotten."""
        ...


def config_file(settings: Settings, project: ProjectId, subject: str) -> Path:
    """Where a configuration is kept: an agent's by the name of its learner, an aggregator's by its own."""
    return ProjectPaths.of(settings, project).config / f"{subject}.json"


def _subject(project: ProjectId, service: Service) -> str:
    return service.learner or service.name.removeprefix(f"{project}-")


def aggregator_name(project: ProjectId, number: int | None) -> str:
    return f"{project}-{AGGREGATOR}" if number is None else f"{project}-{AGGREGATOR}-{number}"


def threads_of(spec: ProjectSpec, learners: int) -> int:
    """How many threads a learner's numerical libraries use."""
    if spec.resources.vcpus is not None:
        return max(1, round(spec.resources.vcpus))
    return max(1, (os.cpu_count() or 1) // learners)


def model_service_name(project: ProjectId) -> ServiceName:
    return ServiceName(f"{project}-{MODEL}")


class ProgramGround:
    """Programs of this machine; agents of joined nodes as well.

    Whoever takes part in a project without joined nodes meets at Unix sockets. With some, its aggregators
    listen on the network as long as it trains, and let in who has a certificate of the project's own
    authority.

    Args:
        names: by which other machines call this one; none: it listens on loopback alone.
    """

    def __init__(self, settings: Settings, ports: Ports, store: "Store", names: Sequence[str] = ()) -> None:
        self._settings = settings
        self._ports = ports
        self._store = store
        self._names = tuple(names)

    def aggregator(self, project: ProjectId, number: int | None, token: str) -> Quarters:
        paths = ProjectPaths.of(self._settings, project)
        if self._is_open(project):
            host = "0.0.0.0" if self._names else LOOPBACK  # noqa: S104 - mutual TLS, see above
            return replace(
                self._quarters(
                    paths, project, number, token, f"grpc+tls://{host}:{self._port(project, number)}"
                ),
                tls=self._tls(project, aggregator_name(project, number), (LOOPBACK, *self._names)),
            )
        return self._quarters(paths, project, number, token, self.location(project, number))

    def _quarters(
        self, paths: ProjectPaths, project: ProjectId, number: int | None, token: str, listen: str
    ) -> Quarters:
        return Quarters(
            listen=listen,
            initial_model=str(paths.initial_model),
            state_dir=str(paths.state if number is None else paths.cluster(number)),
            report=ReportTo(
                socket=str(self._settings.manager_socket), token=token, url_path=_report_path(project)
            ),
        )

    def location(self, project: ProjectId, number: int | None, *, joined: bool = False) -> str:
        if self._is_open(project):
            return f"grpc+tls://{ANY_HOST if joined else LOOPBACK}:{self._port(project, number)}"
        name = project if number is None else f"{project}-{number}"
        return f"grpc+unix://{self._settings.run_dir / name}.sock"

    def members_tls(self, project: ProjectId, member: str) -> Tls | None:
        return self._tls(project, member) if self._is_open(project) else None

    def data(self) -> str:
        return f"grpc+unix://{self._settings.data_socket}"

    def is_joined(self, learner: Learner) -> bool:
        return learner.node != ""

    def agent(
        self, project: ProjectId, name: LearnerId, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {
            "python": results["environment"]["python"],
            "code": results["fetch"]["path"],
            "log": str(ProjectPaths.of(self._settings, project).logs / f"{name}.log"),
        }

    def specification(
        self,
        project: ProjectId,
        spec: ProjectSpec,
        service: Service,
        learners: Mapping[str, Learner],
        results: Mapping[str, Mapping[str, Any]],
    ) -> ServiceSpec:
        learner = learners.get(str(service.learner))
        if learner is not None and self.is_joined(learner):
            return self._on_joined(project, service, learner, results)
        if self.needs_certificate(project, service):  # in the files that its configuration names
            here = (LOOPBACK, *self._names) if service.learner is None else ()
            self._tls(project, _bearer(service), here)
        return ServiceSpec(
            name=service.name,
            command=(
                sys.executable,
                "-P",  # the working directory holds the user's code, which must not be importable here
                "-m",
                _PROGRAMS[service.role],
                "--config",
                str(config_file(self._settings, project, _subject(project, service))),
            ),
            role=service.role,
            project=project,
            nice=_NICE[service.role],
            directory=ProjectPaths.of(self._settings, project).folder,
        )

    def _on_joined(
        self,
        project: ProjectId,
        service: Service,
        learner: Learner,
        results: Mapping[str, Mapping[str, Any]],
    ) -> ServiceSpec:
        row = self._store.project(project)
        code = code_of(self._settings, project, results)
        assignment = {
            "project": project,
            "name": row.name,
            "owner": row.owner,
            "team": row.team,
            "repository": row.source,
            "commit": results["fetch"]["commit"],
            "tags": list(results[DATA]["tags"]),
            "site": learner.site,
            "learner": learner.learner,
            "rounds_total": row.rounds_total,
            "lock": results["lock"]["hash"],
            "python": results["lock"]["python"],
            "code_sha256": code.sha256,
            "code_bytes": code.size_bytes,
        }
        config = config_file(self._settings, project, _subject(project, service))
        return ServiceSpec(
            name=service.name,
            command=(_PROGRAMS[service.role],),
            role=service.role,
            project=project,
            node=learner.node,
            files=(
                File(ASSIGNMENT, json.dumps(assignment).encode()),
                File("config.json", config.read_bytes()),
                *project_files(self._settings, project, learner.learner),
            ),
        )

    def _is_open(self, project: ProjectId) -> bool:
        return any(self.is_joined(learner) for learner in self._store.learners(project))

    def _port(self, project: ProjectId, number: int | None) -> int:
        return self._ports.of(aggregator_name(project, number), is_free=is_free)

    def _tls(self, project: ProjectId, name: str, addresses: Sequence[str] = ()) -> Tls:
        """Written as files: programs of this machine read them there."""
        folder = authority_folder(self._settings, project) / "files"
        named = {}
        for file in project_files(self._settings, project, name, addresses):
            path = named[file.name] = folder / f"{name.removeprefix(f'{project}-')}.{file.name}"
            write_private(path, file.content.decode("ascii"))
        return Tls(cert=str(named[_CERTIFICATE]), key=str(named[_KEY]), ca=str(named[_PROJECT_CA]))

    def model(
        self, deployment: Deployment, folder: str, results: Mapping[str, Mapping[str, Any]]
    ) -> ServiceSpec:
        project = deployment.project
        paths = ProjectPaths.of(self._settings, project)
        name = model_service_name(project)
        port = self._ports.of(name, is_free=is_free)
        config = config_file(self._settings, project, MODEL)
        python = str(results[EXPORT_ENVIRONMENT]["python"])
        if deployment.kind == ONNX:
            converted = json.loads(config_file(self._settings, project, ONNX).read_text(encoding="utf-8"))
            folder, python = converted["folder"], converted["python"]
        ServingConfig(
            name=deployment.model,
            version=str(deployment.version),
            kind="onnx" if deployment.kind == ONNX else "mlflow",
            model=folder,
            python=python,
            port=port,
            log=str(paths.logs / f"{MODEL}.log"),
        ).write(config)
        return ServiceSpec(
            name=name,
            command=tuple(serving_command(str(config), sys.executable)),
            role=MODEL,
            project=project,
            # A version of its own: an orchestrator takes what has not changed for what it runs already.
            environment={"FLOPS_MODEL": f"{deployment.model}/{deployment.version}/{deployment.kind}"},
            directory=paths.folder,
            restart="on-failure",
            max_restarts=_MODEL_RESTARTS,
            port=port,
            publish=True,
        )

    def access(self, project: ProjectId) -> Access:
        return Access()

    def needs_certificate(self, project: ProjectId, service: Service) -> bool:
        return _is_due(self._settings, project, _bearer(service))

    def model_needs_certificate(self, project: ProjectId) -> bool:
        return False

    def release(self, project: ProjectId) -> None:
        self._ports.release(project)


class ImageGround:
    """Images on an orchestrator's nodes.

    Args:
        reports: address of the manager for services, such as ``https://172.17.0.1:40123``.
    """

    def __init__(
        self,
        settings: Settings,
        orchestrator: Orchestrator,
        authority: "Authority",
        ports: Ports,
        reports: str,
    ) -> None:
        self._settings = settings
        self._orchestrator = orchestrator
        self._authority = authority
        self._reports = reports
        # One engine publishes on loopback; services of a swarm are on the networks of their nodes.
        self._beyond = settings.orchestrator == "swarm"
        self._ports = ports

    def aggregator(self, project: ProjectId, number: int | None, token: str) -> Quarters:
        return Quarters(
            listen=f"grpc+tls://0.0.0.0:{self._port(project, number)}",
            initial_model=INITIAL_MODEL_FILE,
            state_dir=_STATE,
            report=ReportTo(
                url=self._reports,
                ca=AUTHORITY_FILE,
                token=token,
                url_path=_report_path(project),
                upload=number is None,
            ),
            tls=_PROJECT_TLS,
        )

    def location(self, project: ProjectId, number: int | None, *, joined: bool = False) -> str:
        return f"grpc+tls://{self._address(project, number)}"

    def members_tls(self, project: ProjectId, member: str) -> Tls | None:
        return _PROJECT_TLS

    def is_joined(self, learner: Learner) -> bool:
        return False

    def data(self) -> str:
        return f"grpc+unix://{DATA_SOCKET}"

    def agent(
        self, project: ProjectId, name: LearnerId, results: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {"python": "", "code": "", "worker_socket": f"{_SEAT}/agent.sock"}

    def specification(
        self,
        project: ProjectId,
        spec: ProjectSpec,
        service: Service,
        learners: Mapping[str, Learner],
        results: Mapping[str, Mapping[str, Any]],
    ) -> ServiceSpec:
        images = results[IMAGES]
        config = config_file(self._settings, project, _subject(project, service))
        if service.role == AGGREGATOR:
            number = _number(project, service)
            return ServiceSpec(
                name=service.name,
                command=_command(service.role),
                role=service.role,
                project=project,
                nice=_NICE[service.role],
                image=results[AGGREGATOR_IMAGE]["image"],
                files=(
                    *self._files(config),
                    File(_CA, self._authority.certificate.encode()),  # of the manager, for reports
                    *self._project_files(project, service, self._address(project, number)),
                ),
                volumes=(Volume(f"{service.name}-state", _STATE),),
                node=self._home_node().name,
                port=self._port(project, number),
            )
        learner = learners[str(service.learner)]
        seat = Volume(f"{project}-seat-{learner.number}", _SEAT)
        if service.role == AGENT:
            return ServiceSpec(
                name=service.name,
                command=_command(service.role),
                role=service.role,
                project=project,
                nice=_NICE[service.role],
                image=images["runtime"],
                files=(*self._files(config), *self._project_files(project, service)),
                volumes=(seat, Volume(DATA_RUN_VOLUME, DATA_RUN)),
                node=learner.node,
            )
        return ServiceSpec(
            name=service.name,
            command=(
                *(USER_PYTHON, "-m", "flops_worker", "--connect", f"{_SEAT}/agent.sock"),
                *("--code", _CODE, "--threads", str(threads_of(spec, len(learners)))),
            ),
            role=service.role,
            project=project,
            nice=_NICE[service.role],
            image=images["learner"],
            volumes=(seat,),
            node=learner.node,
            network="none",
            memory_mb=spec.resources.memory_mb,
            cpus=spec.resources.vcpus,
        )

    def model(
        self, deployment: Deployment, folder: str, results: Mapping[str, Mapping[str, Any]]
    ) -> ServiceSpec:
        project = deployment.project
        config = config_file(self._settings, project, MODEL)
        name = model_service_name(project)
        node = self._home_node() if self._beyond else None
        port = self._ports.of(name)
        ServingConfig(
            name=deployment.model,
            version=str(deployment.version),
            model=_MODEL,
            python=USER_PYTHON,
            host="0.0.0.0",  # noqa: S104  # of a container, or with TLS and a token
            port=port,
            token_file=f"{SECRETS}/{_TOKEN}" if node is not None else None,
            tls=ServingTls(cert=f"{SECRETS}/{_CERTIFICATE}", key=f"{SECRETS}/{_KEY}") if node else None,
        ).write(config)
        files = [File("config.json", config.read_bytes())]
        if node is not None:
            files.append(File(_TOKEN, str(self.access(project).token).encode()))
            files.extend(self._certificate_files(project, name, node.address))
        return ServiceSpec(
            name=name,
            command=_command(MODEL),
            role=MODEL,
            project=project,
            image=deployment.image,
            files=tuple(files),
            node=node.name if node is not None else None,
            restart="on-failure",
            max_restarts=_MODEL_RESTARTS,
            port=port,
            publish=True,
        )

    def access(self, project: ProjectId) -> Access:
        if not self._beyond:
            return Access()
        token = read_or_make_token(ProjectPaths.of(self._settings, project).config / "model.token")
        return Access(self._authority.certificate, token)

    def needs_certificate(self, project: ProjectId, service: Service) -> bool:
        return _is_due(self._settings, project, service.name)

    def model_needs_certificate(self, project: ProjectId) -> bool:
        from flops.manager.authority import DAYS_OF_SERVICE, is_due

        return is_due(self._model_file(project, model_service_name(project)), DAYS_OF_SERVICE)

    def release(self, project: ProjectId) -> None:
        self._ports.release(project)

    def _files(self, config: Path) -> tuple[File, ...]:
        return (File("config.json", config.read_bytes()),)

    def _project_files(
        self, project: ProjectId, service: Service, address: str | None = None
    ) -> tuple[File, ...]:
        """What proves a service to others of its project, and them to it.

        Args:
            address: ``host:port`` at which they reach it; None: it is no server.
        """
        hosts = [address.rpartition(":")[0].strip("[]")] if address is not None else []
        return project_files(self._settings, project, service.name, hosts)

    def _certificate_files(self, project: ProjectId, name: str, host: str) -> tuple[File, ...]:
        file = self._model_file(project, name)
        issued = self._authority.issue_once(file, name, [host])
        return File(_CERTIFICATE, issued.certificate.encode()), File(_KEY, issued.key.encode())

    def _model_file(self, project: ProjectId, name: str) -> Path:
        folder = ProjectPaths.of(self._settings, project).config
        return folder / f"{name.removeprefix(f'{project}-')}.certificate.json"

    def _address(self, project: ProjectId, number: int | None) -> str:
        name = aggregator_name(project, number)
        return self._orchestrator.address(
            ServiceSpec(
                name=ServiceName(name),
                command=_command(AGGREGATOR),
                role=AGGREGATOR,
                project=project,
                image="-",
                node=self._home_node().name,
                port=self._port(project, number),
            )
        )

    def _port(self, project: ProjectId, number: int | None) -> int:
        return self._ports.of(aggregator_name(project, number))

    def _home_node(self) -> Node:
        """Where aggregators run: beside this manager where it is a node: their state stays in reach."""
        return home_node(self._orchestrator)


def authority_folder(settings: Settings, project: ProjectId) -> Path:
    return ProjectPaths.of(settings, project).config / "authority"


def project_files(
    settings: Settings, project: ProjectId, name: str, addresses: Sequence[str] = ()
) -> tuple[File, ...]:
    """What proves a service to others of its project, and them to it.

    Args:
        addresses: at which they reach it; none: it is no server.
    """
    from flops.manager.authority import DAYS_OF_PROJECT, Authority  # most projects need none of it

    folder = authority_folder(settings, project)
    authority = Authority(folder, f"FLOps authority of {project}")
    file = _certificate_file(settings, project, name)
    issued = authority.issue_once(file, name, addresses, client=True, days=DAYS_OF_PROJECT)
    return (
        File(_PROJECT_CA, authority.certificate.encode()),
        File(_CERTIFICATE, issued.certificate.encode()),
        File(_KEY, issued.key.encode()),
    )


def _certificate_file(settings: Settings, project: ProjectId, name: str) -> Path:
    return authority_folder(settings, project) / f"{name.removeprefix(f'{project}-')}.json"


def _is_due(settings: Settings, project: ProjectId, name: str) -> bool:
    """Whether the certificate that `project_files` made for a service is over soon."""
    file = _certificate_file(settings, project, name)
    if not file.exists():
        return False
    from flops.manager.authority import DAYS_OF_PROJECT, is_due  # most projects need none of it

    return is_due(file, DAYS_OF_PROJECT)


def _bearer(service: Service) -> str:
    """To whom a project's certificate is issued where its services are programs."""
    return service.name if service.learner is None else str(service.learner)


def home_node(orchestrator: Orchestrator) -> Node:
    """The node that is this machine; else the first one.

    Raises:
        UnavailableError: there is none.
    """
    nodes = sorted(orchestrator.nodes(), key=lambda node: (node.address != orchestrator.host, node.name))
    if not nodes:
        raise UnavailableError("the orchestrator has no node - add one")
    return nodes[0]


def _number(project: ProjectId, service: Service) -> int | None:
    last = service.name.removeprefix(aggregator_name(project, None))
    return int(last.removeprefix("-")) if last else None


def _command(role: str) -> tuple[str, ...]:
    return (RUNTIME_PYTHON, "-P", "-m", _PROGRAMS[role], "--config", f"{SECRETS}/config.json")


def _report_path(project: ProjectId) -> str:
    return f"/internal/v1/projects/{project}/reports"
