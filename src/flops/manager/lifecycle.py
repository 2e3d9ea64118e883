"""One project's way, one committed step at a time: `Lifecycle.advance` looks at the store and does what is
next.

Whatever `advance` does may be cut off at any point and is done again by the next call, in this process or in
the next one; so each effect is idempotent (by service name, by lock hash, by file) and follows the commit
that says it is wanted.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flops.core.clock import Clock
from flops.core.errors import NotFoundError
from flops.core.events import EventKind
from flops.core.ids import ProjectId, ServiceName
from flops.core.settings import Settings
from flops.core.spec import ProjectSpec, spec_from_mapping
from flops.manager import deployment
from flops.manager.cancellation import Cancellation, Places
from flops.manager.grounds import AGGREGATOR, MODEL, Ground
from flops.manager.inference import Inference
from flops.manager.packaging import Packaging
from flops.manager.preparing import Preparing
from flops.manager.rows import Project, Service
from flops.manager.states import Observation, State
from flops.manager.step_process import StepRunner
from flops.manager.store import Store
from flops.manager.supervision import Action, Verdict, judge
from flops.manager.tracker import Tracker
from flops.orchestration import Orchestrator, ServiceSpec, ServiceStatus
from flops.telemetry import (
    Traced,
    about,
    collector_of,
    record,
    records_spans,
    said,
    span_of_project,
    span_of_request,
    within,
)

log = logging.getLogger(__name__)

STOP_GRACE_S = 2.0
LAST_WORDS_S = 5.0
_CERTIFICATES_S, _NEXT_CERTIFICATE_S = 3600.0, 60.0
"""Between looks at services' certificates, and between services that get new ones."""
_LOOKED_THROUGH = 10_000


@dataclass(frozen=True)
class Surroundings:
    """What every project's way needs."""

    settings: Settings
    store: Store
    orchestrator: Orchestrator
    tracker: Tracker
    clock: Clock
    step_runner: Callable[[ProjectId], StepRunner]
    places: Places
    """Steps of preparations that run at the same time."""
    ground: Ground
    """Where its services run."""
    inference: Inference
    """Serves what was trained."""
    support: Callable[[], None]
    """Sees to it that data servers and the recorder run."""
    step_arguments: Callable[[str, ProjectId], dict[str, Any]] = lambda step, project: {}
    """What a step has to know that no spec says."""
    check_lease: Callable[[], None] = lambda: None
    """Raises what is waited for without end where this manager must not act."""


class Lifecycle:
    """Advances one project; one thread at a time.

    Args:
        cancellation: set when the project is to be stopped, or the manager ends: a running step is given up.
        wake: makes somebody call `advance` again, so many seconds from now; from any thread.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        project: ProjectId,
        cancellation: Cancellation,
        wake: Callable[[float], None],
    ) -> None:
        self._all = surroundings
        self._store = surroundings.store
        self._project = project
        self._cancellation = cancellation
        self._restart_at: dict[ServiceName, float] = {}
        self._certificates_at = 0.0
        self._renewing: Service | None = None
        self._preparing = Preparing(
            surroundings.settings,
            surroundings.store,
            project,
            cancellation,
            surroundings.places,
            surroundings.step_runner,
            surroundings.support,
            surroundings.step_arguments,
            surroundings.orchestrator,
            lambda: wake(0.0),
        )
        self._packaging = Packaging(
            surroundings.settings,
            surroundings.store,
            surroundings.tracker,
            surroundings.clock,
            project,
            cancellation,
            surroundings.step_runner,
            surroundings.inference,
            surroundings.step_arguments,
            lambda: wake(0.0),
        )
        self._wake = wake
        self._last_words_due: float | None = None
        self.settled = False
        self.request: str | None = None
        """Id of the request that it was advanced for last."""

    def advance(self) -> bool:
        """Do what is next; true where there is more to do at once, false where something has to happen first.

        Raises:
            Superseded, Cancelled: somebody asked for something else meanwhile: call again.
            FlopsError: the project cannot go on.
        """
        self._all.check_lease()
        project = self._store.project(self._project)
        self.request = project.request
        parent = span_of_project(project.id, project.request or "")
        with about(request=project.request), within(parent):
            return self._advance(project)

    def _advance(self, project: Project) -> bool:
        if project.state is not State.PREPARING:
            self._preparing.close()
        match project.state:
            case State.SUBMITTED:
                return self._store.begin(self._project, self._all.settings.max_running)
            case State.PREPARING:
                return self._prepare(project)
            case State.DEPLOYING:
                return self._deploy(project)
            case State.TRAINING:
                return self._train(project)
            case State.PACKAGING:
                return self._package(project)
            # Aggregators first: none may take the end of its learners for a failure, and tell of it when the
            # project goes on.
            case State.STOPPING:
                self._stop_services(AGGREGATOR)
                self._stop_services()
                return self._observe(Observation(services_gone=True), "stopped on request")
            case State.PAUSING:
                self._stop_services(AGGREGATOR)
                self._stop_services()
                return self._observe(Observation(services_gone=True), "paused on request")
            case State.PAUSED:
                self.settled = True
                return False
            case _:
                return self._clean_up(project)

    def close(self) -> None:
        """Nothing that was started here runs on; services do."""
        self._preparing.close()
        self._packaging.close()

    def _observe(self, seen: Observation, reason: str | None = None) -> bool:
        self._store.observe(self._project, seen, reason)
        return True

    def _spec(self) -> ProjectSpec:
        return spec_from_mapping(deployment.read_spec(self._all.settings, self._project))

    # preparing

    def _prepare(self, project: Project) -> bool:
        more = self._preparing.advance(project)
        return self._observe(Observation(prepared=True)) if more is None else more

    # deploying and training

    def _deploy(self, project: Project) -> bool:
        learners = self._store.learners(project.id)
        numbers = {cluster.cluster: cluster.number for cluster in self._store.clusters(project.id)}
        spec = self._spec()
        workers = self._all.orchestrator.runs_images
        self._store.want_services(
            project.id, deployment.services_of(project.id, spec, learners, numbers, workers=workers)
        )
        results = self._store.steps(project.id)
        deployment.write_configurations(
            self._all.settings,
            self._all.ground,
            project.id,
            spec,
            learners,
            results,
            rounds=project.rounds_total,
            numbers=numbers,
            traced=Traced(
                project.request or "", span_of_project(project.id, project.request or ""), collector_of()
            ),
        )
        self._all.support()
        self._all.tracker.begin(project, spec, results)
        live = {status.name for status in self._all.orchestrator.list(project.id) if status.live}
        # A training that ended while its pause was asked for needs nobody any more.
        wanted = self._store.services(project.id) if project.training is None else []
        specification = self._specifications()
        for service in wanted:
            self._cancellation.check()
            if service.name not in live:
                self._all.orchestrator.deploy(specification(service))
        return self._observe(Observation(deployed=True))

    def _specifications(self) -> Callable[[Service], ServiceSpec]:
        """What the orchestrator runs for a service; read once for all of them."""
        learners = {str(learner.learner): learner for learner in self._store.learners(self._project)}
        spec, results = self._spec(), self._store.steps(self._project)
        return lambda service: self._all.ground.specification(self._project, spec, service, learners, results)

    def _train(self, project: Project) -> bool:
        self._packaging.prepare_environment(self._request(project))
        # Statuses first: whoever has ended by now has reported before, so its report is in the store below.
        statuses = {status.name: status for status in self._all.orchestrator.list(project.id)}
        self._all.tracker.ship(project.id)
        project = self._store.project(project.id)
        if project.state is not State.TRAINING:
            return True
        if project.training is not None:
            if project.training["outcome"] == "finished":
                return self._observe(Observation(trained=True))
            reason = str(project.training.get("reason") or "the aggregator gave no reason")
            return self._observe(Observation(failed=True), reason)
        self._renew_certificate(statuses)
        for action in judge(project.id, self._store.services(project.id), statuses, self._last_line):
            match action.verdict:
                case Verdict.RESTART | Verdict.WAIT:
                    self._restart(project, action)
                case Verdict.OVER:
                    self._store.end_service(project.id, action.service.name, action.reason, warn=True)
                case Verdict.FAIL:
                    return self._observe(Observation(failed=True), action.reason)
        return False

    def _renew_certificate(self, statuses: dict[ServiceName, ServiceStatus]) -> None:
        """Start one service again whose certificate is over soon: it reads that once, and goes on as after
        any other end. The others have their turns, a minute apart.
        """
        now = self._all.clock.monotonic()
        if self._renewing is None and now >= self._certificates_at:
            self._certificates_at = now + _CERTIFICATES_S
            live = (
                service
                for service in self._store.services(self._project)
                if service.name in statuses and statuses[service.name].live
            )
            needs = self._all.ground.needs_certificate
            self._renewing = next((one for one in live if needs(self._project, one)), None)
        if (service := self._renewing) is None:
            return
        specification = self._specifications()(service)
        with suppress(NotFoundError):
            self._all.orchestrator.stop(service.name, STOP_GRACE_S)
        self._all.orchestrator.deploy(specification)
        self._renewing = None  # not where the orchestrator was away in between
        self._certificates_at = now + _NEXT_CERTIFICATE_S
        log.info("project %s: %s is started again for a new certificate", self._project, service.name)

    def _restart(self, project: Project, action: Action) -> None:
        """Start a service once more, after the pause that it has earned."""
        name, now = action.service.name, self._all.clock.monotonic()
        if action.verdict is Verdict.WAIT and name not in self._restart_at:
            self._store.add_event(project.id, EventKind.WARNING, {"message": action.reason})
        due = self._restart_at.setdefault(name, now + action.pause_s)
        if now < due:
            self._wake(due - now)
            return
        if action.verdict is Verdict.RESTART:
            del self._restart_at[name]
            self._store.count_restart(project.id, name, action.reason)
        else:
            self._restart_at[name] = now + action.pause_s
        self._all.orchestrator.deploy(self._specifications()(action.service))

    def _last_line(self, name: Any) -> str:
        lines = [line.strip() for line in self._all.orchestrator.logs(name, 65536).splitlines()]
        lines = [line for line in lines if line]
        return said(lines[-1])[:300] if lines else ""

    # packaging and the end

    def _package(self, project: Project) -> bool:
        if self._clusters_have_more_to_say():
            return False
        self._stop_services()
        self._all.support()
        self._all.tracker.ship(project.id)
        return self._packaging.advance(project, self._request(project))

    def _clusters_have_more_to_say(self) -> bool:
        """Clusters end by themselves after their root, once their last reports have arrived."""
        now = self._all.clock.monotonic()
        if self._last_words_due is None:
            self._last_words_due = now + LAST_WORDS_S
        live = {status.name for status in self._all.orchestrator.list(self._project) if status.live}
        services = self._store.services(self._project)
        speaking = any(service.cluster is not None and service.name in live for service in services)
        if not speaking or now >= self._last_words_due:
            return False
        self._wake(self._last_words_due - now)
        return True

    def _request(self, project: Project) -> dict[str, Any]:
        return {
            "home": str(self._all.settings.home),
            "project": project.id,
            "spec": deployment.read_spec(self._all.settings, project.id),
            "results": self._store.steps(project.id),
        }

    def _clean_up(self, project: Project) -> bool:
        if not project.cleaned:
            self._stop_services()
            if self._store.services(project.id):
                self._end_tracking(project)
            self._record(project)
            self._store.set_cleaned(project.id)
        self.settled = True
        return False

    def _record(self, project: Project) -> None:
        """Record the span of all that its last request set in motion."""
        request = project.request or ""
        if not request or not records_spans():
            return
        events = self._store.events(project.id, 0, _LOOKED_THROUGH)
        begun = next(
            (event.time for event in events if event.data.get("request") == request), project.created
        )
        record(
            "project",
            begun,
            project.finished or self._all.clock.now(),
            parent=span_of_request(request),
            itself=span_of_project(project.id, request),
            error=None if project.state is State.FINISHED else str(project.state),
            project=project.id,
            rounds=project.rounds_done,
        )

    def _end_tracking(self, project: Project) -> None:
        results = self._store.steps(project.id)
        self._all.tracker.begin(project, self._spec(), results)
        self._all.tracker.ship(project.id)
        self._all.tracker.end(project)

    def _stop_services(self, role: str | None = None) -> None:
        """Those of a role, or all that train; a served model stays."""
        live = [
            status.name
            for status in self._all.orchestrator.list(self._project)
            if status.live and status.role != MODEL and role in (None, status.role)
        ]
        if live:
            self._all.orchestrator.stop_many(live, STOP_GRACE_S)
