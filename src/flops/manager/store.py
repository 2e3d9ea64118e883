"""The store: what the manager knows, committed before anything is done about it.

A change of a project's state and the event that tells of it are one transaction. Every method is one
transaction, safe to call from any thread; ``on_change`` is called after the commit, in the caller's thread.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from flops.core.clock import Clock, SystemClock
from flops.core.errors import ConflictError, NotFoundError
from flops.core.events import Event, EventKind
from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.manager import tables
from flops.manager.clustering import with_ancestors
from flops.manager.figures import Figures
from flops.manager.listing import Page, Sight, Wanted, models_seen, page_of_models, page_of_projects
from flops.manager.reports import Report, apply_report
from flops.manager.rows import Cluster, Deployment, Learner, Model, Project, Service
from flops.manager.states import (
    DEPLOY,
    ENDING,
    EXPORT,
    MODEL_IMAGE,
    REGISTER,
    RESTING,
    TERMINAL,
    Observation,
    State,
    next_state,
)
from flops.manager.usage import uses_of_data
from flops.persistence import DatabaseAwayError, one_view, reading, writing
from flops.telemetry import current_request

_TOLD_OF_STEPS = ("initial",)
"""What of a step's result stands in its event."""
_TOLD_OF_STATES = ("rounds_total",)
"""What of a project's columns stands in the event of the state that they changed with."""
_OF_ONE_MODEL = (EXPORT, REGISTER, MODEL_IMAGE, DEPLOY)
"""Steps that an extended project goes through again."""


class Superseded(Exception):
    """What was to be written belongs to a state that the project has left."""


class Store:
    """All of the manager's durable knowledge, in one database."""

    def __init__(
        self,
        engine: Engine,
        clock: Clock | None = None,
        on_change: Callable[[ProjectId], None] = lambda project: None,
        figures: Figures | None = None,
    ) -> None:
        self._engine = engine
        self._clock = clock or SystemClock()
        self.on_change = on_change
        self._figures = figures or Figures()

    def close(self) -> None:
        self._engine.dispose()

    def one_view(self) -> AbstractContextManager[None]:
        """What this thread reads inside is of one moment; see `flops.persistence.one_view`."""
        return one_view(self._engine)

    # projects

    def create_project(
        self,
        project: ProjectId,
        *,
        name: str,
        spec: Mapping[str, Any],
        source: str,
        rounds_total: int,
        owner: str = "admin",
        team: str | None = None,
    ) -> Project:
        now = self._clock.now()
        with writing(self._engine) as connection:
            connection.execute(
                sa.insert(tables.projects).values(
                    id=project,
                    name=name,
                    state=State.SUBMITTED.value,
                    spec=dict(spec),
                    source=source,
                    created=now,
                    updated=now,
                    last_seq=0,
                    spooled_seq=0,
                    rounds_done=0,
                    rounds_total=rounds_total,
                    cleaned=False,
                    owner=owner,
                    team=team,
                    request=current_request() or None,
                )
            )
            self._add_event(
                connection,
                project,
                EventKind.PROJECT_STATE,
                {"state": State.SUBMITTED.value, "reason": None},
            )
            row = self._project(connection, project)
        self.on_change(project)
        return row

    def project(self, project: ProjectId) -> Project:
        """Raises: NotFoundError: there is no such project."""
        with reading(self._engine) as connection:
            return self._project(connection, project)

    def state(self, project: ProjectId) -> State:
        """Raises: NotFoundError: there is no such project."""
        with reading(self._engine) as connection:
            return self._state(connection, project)

    def belongs_to(self, project: ProjectId) -> tuple[str, str | None]:
        """The owner of a project, and its team.

        Raises:
            NotFoundError: there is no such project.
        """
        table = tables.projects
        query = sa.select(table.c.owner, table.c.team).where(table.c.id == project)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        if row is None:
            raise _unknown(project)
        return row.owner, row.team

    def projects(self) -> list[Project]:
        """All projects, the newest first."""
        query = sa.select(tables.projects).order_by(tables.projects.c.created.desc(), tables.projects.c.id)
        with reading(self._engine) as connection:
            return [_to_project(row) for row in connection.execute(query)]

    def projects_of(self, ids: Iterable[str]) -> list[Project]:
        """Those of these projects that are there."""
        query = sa.select(tables.projects).where(tables.projects.c.id.in_(list(ids)))
        with reading(self._engine) as connection:
            return [_to_project(row) for row in connection.execute(query)]

    def page(self, wanted: Wanted) -> Page:
        """Projects as one line shows them, the newest first; see `page_of_projects`."""
        with reading(self._engine) as connection:
            return page_of_projects(connection, wanted)

    def counts(self) -> dict[State, int]:
        """How many projects there are in each state that has some."""
        column = tables.projects.c.state
        query = sa.select(column, sa.func.count()).group_by(column)
        with reading(self._engine) as connection:
            return {State(state): int(count) for state, count in connection.execute(query)}

    def unsettled(self) -> list[ProjectId]:
        """Projects that still need the reconciler: not at rest, or not cleaned up after their end."""
        table = tables.projects
        ended = table.c.state.in_([s.value for s in TERMINAL])
        query = (
            sa.select(table.c.id)
            .where(table.c.state.not_in([s.value for s in RESTING]) | (ended & table.c.cleaned.is_(False)))
            .order_by(table.c.created)
        )
        with reading(self._engine) as connection:
            return [ProjectId(row.id) for row in connection.execute(query)]

    def observe(self, project: ProjectId, seen: Observation, reason: str | None = None) -> State:
        """Commit the state that follows from what was seen, with its event; nothing where none follows."""
        with writing(self._engine) as connection:
            state = self._state(connection, project)
            following = next_state(state, seen)
            if following is state:
                return state
            moved_by = {"request": current_request() or None} if seen.resume_requested else {}
            self._move(connection, project, following, reason, **moved_by)
            if state is State.PAUSED and following is State.SUBMITTED:
                self._start_anew(connection, project)
        self.on_change(project)
        return following

    def begin(self, project: ProjectId, running: int) -> bool:
        """Commit that a submitted project begins, where it is its turn: the first that came is the first that
        begins. Where it is not, its reason says so.

        Args:
            running: so many projects run at the same time.
        """
        with reading(self._engine) as connection:  # most looks change nothing, and many projects may wait
            row = self._project(connection, project)
            begins, reason = self._turn(connection, row, running)
            if not begins and reason == row.reason:
                return False
        table = tables.projects
        with writing(self._engine) as connection:
            row = self._project(connection, project)
            if row.state is not State.SUBMITTED:
                return True
            begins, reason = self._turn(connection, row, running)
            if begins:
                self._move(connection, project, next_state(row.state, Observation(begun=True)), None)
            else:
                connection.execute(sa.update(table).where(table.c.id == project).values(reason=reason))
        self.on_change(project)
        return begins

    def _turn(self, connection: Connection, row: Project, running: int) -> tuple[bool, str]:
        """Whether it is a submitted project's turn, and why it is not."""
        table = tables.projects
        busy = table.c.state.not_in([s.value for s in (*RESTING, State.SUBMITTED)])
        earlier = sa.or_(
            table.c.created < row.created, sa.and_(table.c.created == row.created, table.c.id < row.id)
        )
        active = connection.execute(sa.select(sa.func.count()).where(busy)).scalar() or 0
        waiting = sa.select(sa.func.count()).where(table.c.state == State.SUBMITTED.value, earlier)
        before = connection.execute(waiting).scalar() or 0
        return before < running - active, f"{active} projects run, {before} wait before this one"

    def _move(
        self, connection: Connection, project: ProjectId, state: State, reason: str | None, **more: Any
    ) -> None:
        """Write a state and its event; ``more`` are columns that change with it."""
        now = self._clock.now()
        connection.execute(
            sa.update(tables.projects)
            .where(tables.projects.c.id == project)
            .values(
                state=state.value,
                reason=reason,
                updated=now,
                finished=now if state in TERMINAL else None,
                **more,
            )
        )
        told = {key: more[key] for key in _TOLD_OF_STATES if key in more}
        self._add_event(
            connection, project, EventKind.PROJECT_STATE, {"state": state.value, "reason": reason, **told}
        )

    def extend(self, project: ProjectId, rounds: int) -> State:
        """Commit that a project at rest is to train more rounds than it was: a finished one goes on, a paused
        one does with its resumption.

        Raises:
            ConflictError: the project is neither finished and cleaned up nor paused.
        """
        with writing(self._engine) as connection:
            row = self._project(connection, project)
            if row.state is not State.PAUSED and not (row.state is State.FINISHED and row.cleaned):
                raise ConflictError(f"project {project} is {row.state} - try again when it is finished")
            following = next_state(row.state, Observation(extended=True))
            values: dict[str, Any] = {"rounds_total": row.rounds_total + rounds, "training": None}
            values["request"] = current_request() or None
            mode = (row.spec.get("training") or {}).get("mode")
            unit = "cycle" if mode == "hierarchical" else "round"
            reason = f"extended by {rounds} {unit}{'s' if rounds > 1 else ''}"
            if following is not row.state:
                values |= {"cleaned": False, "tracking": None}
                self._start_anew(connection, project)
            table = tables.steps
            connection.execute(
                sa.delete(table).where(table.c.project == project, table.c.name.in_(_OF_ONE_MODEL))
            )
            self._move(connection, project, following, reason, **values)
        self.on_change(project)
        return following

    def retry(self, project: ProjectId) -> State:
        """Commit that a failed or stopped project is attempted once more, from its last finished step.

        Raises:
            ConflictError: the project is neither, or not cleaned up yet.
        """
        with writing(self._engine) as connection:
            row = self._project(connection, project)
            following = next_state(row.state, Observation(retry_requested=True))
            if following is row.state or not row.cleaned:
                raise ConflictError(f"project {project} is {row.state} - try again when it has ended")
            reason = f"another attempt was requested, the project was {row.state}"
            failed = (row.training or {}).get("outcome") == "failed"
            self._start_anew(connection, project)
            connection.execute(
                sa.delete(tables.steps).where(
                    tables.steps.c.project == project, tables.steps.c.finished.is_(None)
                )
            )
            training = None if failed else row.training
            self._move(
                connection,
                project,
                following,
                reason,
                cleaned=False,
                training=training,
                request=current_request() or None,
            )
        self.on_change(project)
        return following

    def set_cleaned(self, project: ProjectId) -> None:
        self._update(project, cleaned=True)

    def set_tracking(self, project: ProjectId, tracking: Mapping[str, Any]) -> None:
        self._update(project, tracking=dict(tracking))

    def set_spooled(self, project: ProjectId, seq: int) -> None:
        self._update(project, spooled_seq=seq)

    def delete_project(self, project: ProjectId) -> None:
        """Raises: ConflictError: the project is not at its end, or not cleaned up yet."""
        with writing(self._engine) as connection:
            row = self._project(connection, project)
            if not row.terminal or not row.cleaned:
                raise ConflictError(
                    f"project {project} is {row.state} - stop it first with 'flops stop {project}'"
                )
            connection.execute(sa.delete(tables.projects).where(tables.projects.c.id == project))
        self.on_change(project)

    # steps

    def uses_of_data(self, **wanted: Any) -> list[dict[str, Any]]:
        """See `flops.manager.usage.uses_of_data`."""
        with reading(self._engine) as connection:
            return uses_of_data(connection, **wanted)

    def steps(self, project: ProjectId) -> dict[str, dict[str, Any]]:
        """Results of the finished steps by name."""
        table = tables.steps
        query = sa.select(table).where(table.c.project == project, table.c.finished.is_not(None))
        with reading(self._engine) as connection:
            return {row.name: dict(row.result or {}) for row in connection.execute(query)}

    def add_progress(self, project: ProjectId, step: str, message: str) -> None:
        """Add what a running step says of itself; while the database is away it is lost, the step goes on.

        Raises:
            Superseded: the project was stopped or paused, or is at its end.
        """
        with suppress(DatabaseAwayError):
            self.add_event(project, EventKind.STEP_PROGRESS, {"step": step, "message": message})

    def start_step(self, project: ProjectId, step: str) -> None:
        """Note that the step runs. Its event is written once, however often the step is repeated.

        Raises:
            Superseded: the project was stopped or paused, or is at its end.
        """
        table = tables.steps
        with writing(self._engine) as connection:
            self._check_alive(connection, project)
            known = connection.execute(
                sa.select(table.c.name).where(table.c.project == project, table.c.name == step)
            ).first()
            if known is not None:
                return
            connection.execute(sa.insert(table).values(project=project, name=step, started=self._clock.now()))
            self._add_event(connection, project, EventKind.STEP_STARTED, {"step": step})
        self.on_change(project)

    def finish_step(
        self,
        project: ProjectId,
        step: str,
        result: Mapping[str, Any],
        *,
        learners: Sequence[Learner] = (),
        clusters: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Commit a step's result, its events (``warnings`` of the result too), and the learners it chose or
        the clusters that it put them into.

        Raises:
            Superseded: the project was stopped or paused, or is at its end.
        """
        table = tables.steps
        with writing(self._engine) as connection:
            self._check_alive(connection, project)
            row = connection.execute(
                sa.select(table).where(table.c.project == project, table.c.name == step)
            ).one()
            if row.finished is not None:
                return
            now = self._clock.now()
            connection.execute(
                sa.update(table)
                .where(table.c.project == project, table.c.name == step)
                .values(finished=now, result=dict(result))
            )
            for learner in learners:
                connection.execute(sa.insert(tables.learners).values(project=project, **vars(learner)))
            self._add_clusters(connection, project, clusters or {})
            for message in result.get("warnings", ()):
                self._add_event(connection, project, EventKind.WARNING, {"message": message})
            self._add_event(
                connection,
                project,
                EventKind.STEP_FINISHED,
                {"step": step, "duration_s": round(now - row.started, 3)}
                | {key: result[key] for key in _TOLD_OF_STEPS if key in result},
            )
        self._figures.step_finished(step, now - row.started)
        self.on_change(project)

    # services and learners

    def want_services(self, project: ProjectId, services: Iterable[Service]) -> None:
        """Note which services the project is going to have; names that are known already stay as they are.

        Raises:
            Superseded: the project was stopped or paused, or is at its end.
        """
        with writing(self._engine) as connection:
            self._check_alive(connection, project)
            known = {service.name for service in self._services(connection, project)}
            for service in services:
                if service.name not in known:
                    connection.execute(sa.insert(tables.services).values(project=project, **vars(service)))
        self.on_change(project)

    def services(self, project: ProjectId) -> list[Service]:
        with reading(self._engine) as connection:
            return self._services(connection, project)

    def count_restart(self, project: ProjectId, name: ServiceName, reason: str) -> None:
        """Commit that a service is going to be started once more, with a warning event."""
        table = tables.services
        with writing(self._engine) as connection:
            self._check_alive(connection, project)
            connection.execute(
                sa.update(table)
                .where(table.c.project == project, table.c.name == name)
                .values(restarts=table.c.restarts + 1)
            )
            self._add_event(connection, project, EventKind.WARNING, {"message": reason})
        self.on_change(project)

    def end_service(self, project: ProjectId, name: ServiceName, why: str, *, warn: bool) -> None:
        """Commit that a service is over for good."""
        table = tables.services
        with writing(self._engine) as connection:
            changed = connection.execute(
                sa.update(table)
                .where(table.c.project == project, table.c.name == name, table.c.over.is_(None))
                .values(over=why)
            )
            if warn and changed.rowcount and self._state(connection, project) not in TERMINAL:
                self._add_event(connection, project, EventKind.WARNING, {"message": why})
        self.on_change(project)

    def learners(self, project: ProjectId) -> list[Learner]:
        table = tables.learners
        query = sa.select(table).where(table.c.project == project).order_by(table.c.number)
        with reading(self._engine) as connection:
            return [
                Learner(
                    LearnerId(row.learner),
                    row.number,
                    row.site,
                    row.state,
                    row.reason,
                    row.cluster,
                    row.node,
                )
                for row in connection.execute(query)
            ]

    def clusters(self, project: ProjectId) -> list[Cluster]:
        """A hierarchy's clusters, outer ones before inner ones."""
        table = tables.clusters
        query = sa.select(table).where(table.c.project == project).order_by(table.c.number)
        with reading(self._engine) as connection:
            return [
                Cluster(row.cluster, row.number, row.state, row.reason, row.rounds_done)
                for row in connection.execute(query)
            ]

    def rounds(self, project: ProjectId, after: int = 0) -> list[dict[str, Any]]:
        """Data of the finished rounds behind a number, in order."""
        table = tables.rounds
        query = (
            sa.select(table.c.data)
            .where(table.c.project == project, table.c.number > after)
            .order_by(table.c.number)
        )
        with reading(self._engine) as connection:
            return [dict(row.data) for row in connection.execute(query)]

    # events

    def add_event(self, project: ProjectId, kind: EventKind, data: Mapping[str, Any]) -> None:
        """Raises: Superseded: the project was stopped or paused, or is at its end."""
        with writing(self._engine) as connection:
            self._check_alive(connection, project)
            self._add_event(connection, project, kind, data)
        self.on_change(project)

    def events(self, project: ProjectId, after: int = 0, limit: int = 1000) -> list[Event]:
        """Up to ``limit`` events behind number ``after``, in order.

        Raises:
            NotFoundError: there is no such project.
        """
        table = tables.events
        query = (
            sa.select(table)
            .where(table.c.project == project, table.c.seq > after)
            .order_by(table.c.seq)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            self._state(connection, project)
            return [
                Event(project, row.seq, row.time, EventKind(row.kind), row.data)
                for row in connection.execute(query)
            ]

    def accept_reports(self, project: ProjectId, source: str, reports: Sequence[Report]) -> int:
        """Take over what a service reports, each report once, and answer the last number taken over.

        Reports that arrive after the project's end are acknowledged, so that the sender can end, and dropped.
        """
        table = tables.report_sources
        with writing(self._engine) as connection:
            state = self._state(connection, project)
            known = connection.execute(
                sa.select(table.c.last_seq).where(table.c.project == project, table.c.source == source)
            ).first()
            last = known.last_seq if known else 0
            fresh = sorted((report for report in reports if report.seq > last), key=lambda report: report.seq)
            if not fresh:
                return int(last)
            if known is None:
                connection.execute(
                    sa.insert(table).values(project=project, source=source, last_seq=fresh[-1].seq)
                )
            else:
                connection.execute(
                    sa.update(table)
                    .where(table.c.project == project, table.c.source == source)
                    .values(last_seq=fresh[-1].seq)
                )
            if state not in TERMINAL:
                for report in fresh:
                    apply_report(connection, project, report)
                    self._add_event(connection, project, report.kind, report.data, time=report.time)
        self._figures.accepted(fresh)
        self.on_change(project)
        return fresh[-1].seq

    # models

    def add_model(self, model: Model) -> None:
        """Commit a registered model with its event; nothing where it is known already."""
        table = tables.models
        with writing(self._engine) as connection:
            known = connection.execute(
                sa.select(table.c.name).where(table.c.name == model.name, table.c.version == model.version)
            ).first()
            if known is not None:
                return
            projects = tables.projects
            owner = connection.execute(
                sa.select(projects.c.owner, projects.c.team).where(projects.c.id == model.project)
            ).one()
            connection.execute(sa.insert(table).values(**vars(model), **owner._mapping))
            self._add_event(
                connection,
                model.project,
                EventKind.MODEL_REGISTERED,
                {
                    "name": model.name,
                    "version": model.version,
                    "round": model.round,
                    "uri": model.uri,
                },
            )
        self.on_change(model.project)

    def models(
        self, project: ProjectId | None = None, *, name: str | None = None, sight: Sight | None = None
    ) -> list[Model]:
        """Registered models, the newest first."""
        table = tables.models
        query = models_seen(sight).order_by(table.c.created.desc())
        if project is not None:
            query = query.where(table.c.project == project)
        if name is not None:
            query = query.where(table.c.name == name)
        with reading(self._engine) as connection:
            return [_to_model(row) for row in connection.execute(query)]

    def page_of_models(
        self, name: str | None, after: str | None, limit: int, sight: Sight | None = None
    ) -> tuple[list[Model], str | None]:
        """Registered models, the newest first; see `page_of_models`."""
        with reading(self._engine) as connection:
            return page_of_models(connection, name, after, limit, sight)

    def model(self, name: str, version: int, sight: Sight | None = None) -> Model:
        """Raises: NotFoundError: there is no such version, or it is out of sight."""
        table = tables.models
        query = models_seen(sight).where(table.c.name == name, table.c.version == version)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        if row is None:
            raise NotFoundError(
                f"there is no version {version} of a model '{name[:80]}' - see 'flops models'"
            )
        return _to_model(row)

    # served models

    def deployment(self, project: ProjectId) -> Deployment | None:
        query = sa.select(tables.deployments).where(tables.deployments.c.project == project)
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        return None if row is None else Deployment(**dict(row._mapping))

    def deployments(self) -> list[Deployment]:
        """Of all projects, ended ones too."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(tables.deployments))
            return [Deployment(**dict(row._mapping)) for row in rows]

    def set_deployment(self, deployment: Deployment, told: Mapping[str, Any] | None = None) -> None:
        """Commit what is served for a project, or no longer is.

        Args:
            told: data of its event; None: there is no event.
        Raises:
            NotFoundError: there is no such project.
        """
        table, project = tables.deployments, deployment.project
        with writing(self._engine) as connection:
            self._state(connection, project)
            connection.execute(sa.delete(table).where(table.c.project == project))
            connection.execute(sa.insert(table).values(**vars(deployment)))
            if told is not None:
                kind = EventKind.MODEL_UNDEPLOYED if deployment.stopped else EventKind.MODEL_DEPLOYED
                self._add_event(connection, project, kind, told)
        self.on_change(project)

    # inside a transaction

    def _project(self, connection: Connection, project: ProjectId) -> Project:
        row = connection.execute(sa.select(tables.projects).where(tables.projects.c.id == project)).first()
        if row is None:
            raise _unknown(project)
        return _to_project(row)

    def _state(self, connection: Connection, project: ProjectId) -> State:
        state = connection.execute(
            sa.select(tables.projects.c.state).where(tables.projects.c.id == project)
        ).scalar()
        if state is None:
            raise _unknown(project)
        return State(state)

    def _check_alive(self, connection: Connection, project: ProjectId) -> None:
        state = self._state(connection, project)
        if state in ENDING or state in RESTING:
            raise Superseded(f"project {project} is {state}")

    def _start_anew(self, connection: Connection, project: ProjectId) -> None:
        """Every service has its chances again; an ejected learner stays out."""
        connection.execute(
            sa.update(tables.services)
            .where(tables.services.c.project == project)
            .values(restarts=0, over=None)
        )
        for table in (tables.learners, tables.clusters):
            connection.execute(
                sa.update(table)
                .where(table.c.project == project, table.c.state != "ejected")
                .values(state="waiting", reason=None)
            )

    def _add_clusters(
        self, connection: Connection, project: ProjectId, clusters: Mapping[str, Sequence[str]]
    ) -> None:
        for number, path in enumerate(with_ancestors(list(clusters)), start=1):
            connection.execute(
                sa.insert(tables.clusters).values(project=project, **vars(Cluster(path, number)))
            )
        table = tables.learners
        for path, learners in clusters.items():
            connection.execute(
                sa.update(table)
                .where(table.c.project == project, table.c.learner.in_(learners))
                .values(cluster=path)
            )

    def _services(self, connection: Connection, project: ProjectId) -> list[Service]:
        table = tables.services
        query = sa.select(table).where(table.c.project == project).order_by(table.c.name)
        return [
            Service(
                ServiceName(row.name),
                row.role,
                LearnerId(row.learner) if row.learner else None,
                row.restarts,
                row.over,
                row.cluster,
            )
            for row in connection.execute(query)
        ]

    def _add_event(
        self,
        connection: Connection,
        project: ProjectId,
        kind: EventKind,
        data: Mapping[str, Any],
        time: float | None = None,
    ) -> None:
        table = tables.projects
        now = self._clock.now()
        if kind is EventKind.PROJECT_STATE and (request := current_request()):
            data = {**data, "request": request}
        # The write lock is held, so reading and raising the number is one thing.
        seq = connection.execute(sa.select(table.c.last_seq).where(table.c.id == project)).scalar()
        if seq is None:  # a late registration of a removed project's model
            return
        connection.execute(
            sa.update(table).where(table.c.id == project).values(last_seq=seq + 1, updated=now)
        )
        connection.execute(
            sa.insert(tables.events).values(
                project=project,
                seq=seq + 1,
                time=now if time is None else time,
                kind=kind.value,
                data=dict(data),
            )
        )

    def _update(self, project: ProjectId, **values: Any) -> None:
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(tables.projects).where(tables.projects.c.id == project).values(**values)
            )
        self.on_change(project)


def _unknown(project: ProjectId) -> NotFoundError:
    return NotFoundError(f"there is no project {project} - see 'flops ls'")


def _to_project(row: sa.Row[Any]) -> Project:
    values = dict(row._mapping)
    return Project(**(values | {"state": State(values["state"])}))


def _to_model(row: sa.Row[Any]) -> Model:
    return Model(**dict(row._mapping))
