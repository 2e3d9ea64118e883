"""Trained models that are served: one service for each project, from its deployment until it is undeployed.

A deployment is committed before its service is started, so a manager that is killed, or was stopped, goes on
with it; the orchestrator starts a server again that ends. Requests pass through as they are, so whoever may
use the manager may use its models, wherever they run.
"""

import logging
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from flops.core.clock import Clock
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.core.ids import ProjectId, ServiceName
from flops.manager.cancellation import Cancellation
from flops.manager.grounds import Access, Ground, model_service_name
from flops.manager.rows import Deployment, Model
from flops.manager.states import EXPORT_ENVIRONMENT, MODEL_IMAGE
from flops.manager.store import Store
from flops.orchestration import Orchestrator, ServiceStatus, deploy_in_place

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 180.0
_LOOK_AGAIN_S = 0.05
_PREDICT_TIMEOUT = httpx.Timeout(60.0, connect=2.0)
_STOP_GRACE_S = 12.0
"""Longer than the server's own, which ends its requests first."""


@dataclass(frozen=True)
class Answer:
    """What a server said, as it said it."""

    status: int
    content_type: str
    body: bytes


Convert = Callable[[ProjectId, Path], None]
"""Turns the model in a folder into ONNX, and keeps what `Ground.model` needs to serve that."""


class Inference:
    """All served models. Safe from any thread.

    Args:
        convert: None: models are served as they are only.
    """

    def __init__(
        self,
        store: Store,
        orchestrator: Orchestrator,
        ground: Ground,
        clock: Clock,
        convert: Convert | None = None,
    ) -> None:
        self._store = store
        self._convert = convert
        self._orchestrator = orchestrator
        self._ground = ground
        self._clock = clock
        self._turns: defaultdict[ProjectId, threading.Lock] = defaultdict(threading.Lock)
        self._closed = Cancellation()
        self._clients: dict[str | None, httpx.Client] = {}

    def deploy(
        self, project: ProjectId, cancellation: Cancellation | None = None, *, onnx: bool = False
    ) -> dict[str, Any]:
        """Serve the project's newest model; answers once it predicts. An older one is replaced.

        Args:
            onnx: converted, once the converted model has answered as the original does.
        Raises:
            InvalidInputError: this orchestrator serves no converted models.
            ConflictError: the project has no model that can be served.
            FailedError: the server ended, or does not get ready; nothing is served then.
            Cancelled: in the same way.
        """
        given_up = cancellation or self._closed
        with self._turns[project]:
            deployment, service = self._wanted(project, onnx=onnx)
            self._store.set_deployment(deployment)
            try:
                self._start(deployment, replaces=True)
                url = self._wait_until_ready(project, service, given_up)
            except BaseException:
                self._end(deployment)
                raise
            told = {"name": deployment.model, "version": deployment.version, "url": url}
            self._store.set_deployment(
                deployment, {**told, "kind": deployment.kind, "image": deployment.image}
            )
        return told

    def undeploy(self, project: ProjectId) -> None:
        """Serve the project's model no longer. No effect where that is so already.

        Raises:
            NotFoundError: it never was.
        """
        with self._turns[project]:
            deployment = self._store.deployment(project)
            if deployment is None:
                raise NotFoundError(
                    f"no model of project {project} is deployed - deploy it with 'flops deploy {project}'"
                )
            if not deployment.stopped:
                self._end(deployment, {"name": deployment.model, "version": deployment.version})

    def start_all(self) -> None:
        """Go on with every deployment; what cannot be started is logged, and the others are."""
        for deployment in self._store.deployments():
            if not deployment.stopped:
                try:
                    self._start(deployment)
                except FlopsError as error:
                    log.warning("the model of project %s is not served: %s", deployment.project, error)

    def renew_certificates(self) -> None:
        """Start servers again whose certificates are over soon: they read them once."""
        for deployment in self._store.deployments():
            project = deployment.project
            if deployment.stopped or not self._ground.model_needs_certificate(project):
                continue
            with self._turns[project]:
                current = self._store.deployment(project)
                if current is None or current.stopped:
                    continue
                log.info("the model of project %s is started again for a new certificate", project)
                try:
                    self._start(current, replaces=True)
                except FlopsError as error:
                    log.warning("the model of project %s is not served: %s", project, error)

    def stop_all(self) -> None:
        """Nothing is served until `start_all`."""
        for deployment in self._store.deployments():
            self._stop_service(model_service_name(deployment.project))

    def view(self, project: ProjectId, statuses: Mapping[str, ServiceStatus]) -> dict[str, Any] | None:
        """What is served for the project, where and how it is; None: nothing."""
        deployment = self._store.deployment(project)
        if deployment is None or deployment.stopped:
            return None
        status = statuses.get(model_service_name(project))
        return {
            "model": deployment.model,
            "version": deployment.version,
            "kind": deployment.kind,
            "image": deployment.image,
            "state": status.state if status is not None else "pending",
            "reason": (status.reason if status is not None else "") or None,
            "url": _url(status, self._ground.access(project)) if status is not None else None,
        }

    def predict(self, project: ProjectId, content_type: str, body: bytes) -> Answer:
        """Pass a request in MLflow's scoring protocol on.

        Raises:
            NotFoundError: nothing is served for the project.
            UnavailableError: its server does not answer.
        """
        deployment = self._store.deployment(project)
        if deployment is None or deployment.stopped:
            raise NotFoundError(
                f"no model of project {project} is deployed - deploy it with 'flops deploy {project}'"
            )
        status = self._status(model_service_name(project))
        access = self._ground.access(project)
        url = _url(status, access) if status is not None else None
        if status is None or url is None:
            why = status.reason if status is not None and status.reason else "it is not running"
            raise UnavailableError(
                f"the model of project {project} cannot be reached: {why} - see 'flops logs {project}'"
            )
        headers = {"Content-Type": content_type}
        if access.token is not None:
            headers["Authorization"] = f"Bearer {access.token}"
        try:
            answer = self._http(access).post(f"{url}/invocations", content=body, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the model of project {project} did not answer ({error}) - see 'flops logs {project}'"
            ) from error
        return Answer(answer.status_code, answer.headers.get("content-type", ""), answer.content)

    def close(self) -> None:
        """Give up deployments that are under way; what is served goes on."""
        self._closed.cancel()
        for client in self._clients.values():
            client.close()

    def _http(self, access: Access) -> httpx.Client:
        client = self._clients.get(access.ca)
        if client is None:
            # Nobody is trusted but our own authority; there is nothing to verify where plain HTTP is spoken.
            trusted = ssl.create_default_context(cadata=access.ca) if access.ca is not None else _no_tls()
            # trust_env: a proxy that is set for the internet must not get what is predicted here
            fresh = httpx.Client(trust_env=False, timeout=_PREDICT_TIMEOUT, verify=trusted)
            client = self._clients.setdefault(access.ca, fresh)
        return client

    def _wanted(self, project: ProjectId, *, onnx: bool) -> tuple[Deployment, ServiceName]:
        model = self._model(project)
        if onnx:
            if self._convert is None or self._orchestrator.runs_images:
                raise InvalidInputError(
                    "converted models are served by the orchestrator 'process' only - deploy without ONNX"
                )
            self._convert(project, Path(str(model.folder)))
        image = self._store.steps(project).get(MODEL_IMAGE, {}).get("image")
        deployment = Deployment(
            project,
            model=model.name,
            version=model.version,
            kind="onnx" if onnx else "mlflow",
            image=image if self._orchestrator.runs_images else None,
            created=self._clock.now(),
        )
        return deployment, model_service_name(project)

    def _model(self, project: ProjectId) -> Model:
        models = self._store.models(project)
        if not models:
            raise ConflictError(
                f"project {project} has registered no model - it does when it has finished, see "
                f"'flops show {project}'"
            )
        if not models[0].folder:
            raise ConflictError(
                f"the files of model {models[0].name} version {models[0].version} are not on this machine - "
                f"get them from MLflow: {models[0].uri}"
            )
        return models[0]

    def _start(self, deployment: Deployment, *, replaces: bool = False) -> None:
        results = self._store.steps(deployment.project)
        if "python" not in results.get(EXPORT_ENVIRONMENT, {}):
            raise ConflictError(
                f"project {deployment.project} has no environment that loads its model - it was trained by "
                "an older version or elsewhere, or its export failed"
            )
        model = self._store.model(deployment.model, deployment.version)
        spec = self._ground.model(deployment, str(model.folder), results)
        if replaces:
            deploy_in_place(self._orchestrator, spec, _STOP_GRACE_S)
        else:
            self._orchestrator.deploy(spec)

    def _wait_until_ready(self, project: ProjectId, service: ServiceName, given_up: Cancellation) -> str:
        deadline = self._clock.monotonic() + READY_TIMEOUT_S
        access = self._ground.access(project)
        woken = threading.Event()
        with given_up.calling(woken.set):
            while self._clock.monotonic() < deadline:
                given_up.check()
                status = self._status(service)
                if status is None or not status.live:
                    break
                url = _url(status, access)
                if url is not None and self._is_healthy(url, access):
                    return url
                if status.restarts:
                    break
                woken.wait(_LOOK_AGAIN_S)
        status = self._status(service)
        lines = [line for line in self._orchestrator.logs(service, 4096).splitlines() if line.strip()]
        how = status.reason if status is not None and status.reason else "it did not get ready in time"
        raise FailedError(f"the model cannot be served: {how}" + (f": {lines[-1]}" if lines else ""))

    def _is_healthy(self, url: str, access: Access) -> bool:
        try:
            return self._http(access).get(f"{url}/health", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def _end(self, deployment: Deployment, told: Mapping[str, Any] | None = None) -> None:
        with suppress(NotFoundError):  # the project was removed meanwhile
            self._store.set_deployment(replace(deployment, stopped=True), told)
        self._stop_service(model_service_name(deployment.project))

    def _stop_service(self, service: ServiceName) -> None:
        with suppress(NotFoundError):
            self._orchestrator.stop(service, _STOP_GRACE_S)

    def _status(self, service: ServiceName) -> ServiceStatus | None:
        project = service.rpartition("-")[0]
        return next((one for one in self._orchestrator.list(project) if one.name == service), None)


def _url(status: ServiceStatus, access: Access) -> str | None:
    return f"{access.scheme}://{status.endpoint}" if status.endpoint is not None else None


def _no_tls() -> ssl.SSLContext:
    """Trusts nobody, and reads none of the system's certificates, which takes a while."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
