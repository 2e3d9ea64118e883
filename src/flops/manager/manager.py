"""The manager as its callers see it: projects, data and models; what the REST API speaks to.

Thread-safe. Every request is committed before it has an effect, so a manager that is killed goes on with all
of it.
"""

import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from flops.core.clock import Clock, SystemClock
from flops.core.errors import (
    ConflictError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)
from flops.core.events import Event, EventKind
from flops.core.ids import ProjectId, ServiceName, new_project_id
from flops.core.settings import Settings
from flops.core.spec import ProjectSpec, spec_from_mapping
from flops.federation import check_strategy
from flops.fleet import JoinedNode, JoinToken
from flops.identity import AuditLog, IdentityStore, Role
from flops.manager import choosing, deployment, orchestrators, packaging
from flops.manager.backup import RESTORED, Backup
from flops.manager.broadcast import Broadcast
from flops.manager.cancellation import Cancellation, Places
from flops.manager.choosing import OFFERS, Offers
from flops.manager.code_archive import code_of
from flops.manager.databases import open_own_database
from flops.manager.figures import Figures
from flops.manager.grounds import Ground, ImageGround, ProgramGround, config_file
from flops.manager.image_builds import ImageBuilds
from flops.manager.inference import Answer, Inference
from flops.manager.joined import JoinedNodes
from flops.manager.lifecycle import Surroundings
from flops.manager.listing import Page, Sight, Wanted
from flops.manager.nodes import Nodes
from flops.manager.offering import offers_of
from flops.manager.once import CarryOut, Once, OnceRequest
from flops.manager.orchestrators import open_programs
from flops.manager.ownership import Holdings, SiteOwners
from flops.manager.paths import ProjectPaths, write_private_json
from flops.manager.placing import Placing
from flops.manager.ports import Ports
from flops.manager.reconciler import SOON_S, Reconciler
from flops.manager.reports import Report
from flops.manager.sources import SOURCES
from flops.manager.states import (
    AGGREGATOR_IMAGE,
    CLUSTERS,
    DATA,
    ENVIRONMENT,
    IMAGES,
    MODEL_IMAGE,
    ONNX,
    PAUSABLE,
    REGISTER,
    RESTING,
    RETRIABLE,
    Observation,
    State,
)
from flops.manager.step_process import StepProcess, StepRunner
from flops.manager.store import Store
from flops.manager.support import GuiDoor, Support
from flops.manager.top import Top
from flops.manager.tracker import Tracker
from flops.manager.uploads import Upload
from flops.manager.views import held_fragments, joined_node_view, model_view, project_view
from flops.orchestration import Orchestrator, PermittedOrchestrator, ServiceStatus
from flops.persistence import lease_of
from flops.telemetry import belongs
from flops.tracking import Spool

if TYPE_CHECKING:
    from flops.identity.signing_in import SignIns

log = logging.getLogger(__name__)

PREPARING_AT_ONCE = 4
_NICE = 10
"""Of projects' steps: they leave the processors to the manager, which is asked how far they are."""
STOP_TIMEOUT_S = 15.0
_DATA_CALLS_AT_ONCE = 2
_OWN_LOG, _OWN_TAIL_BYTES = "manager", 4 << 20
MAX_ROUNDS = 100_000
_ENDING = frozenset({EventKind.TRAINING_FINISHED, EventKind.TRAINING_FAILED})


class Manager:
    """Everything that happens on one FLOPS_HOME. `start` once, `close` at the end.

    Args:
        programs: runs programs of this machine; None: processes.
        orchestrator: runs projects' services; None: ``programs`` does.
        reports_url: where services that are images report; needed by an orchestrator that runs them.
        database: of `open_own_database`; None: opened here.
        network_names: by which other machines call this one; none: it answers itself alone.
        step_runner, clock: replaced in tests.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        programs: Orchestrator | None = None,
        orchestrator: Orchestrator | None = None,
        reports_url: str | None = None,
        database: sa.Engine | None = None,
        network_names: Sequence[str] = (),
        step_runner: Callable[[ProjectId], StepRunner] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings
        self._clock = clock or SystemClock()
        for folder in (settings.home, settings.projects_dir, settings.run_dir, settings.logs_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _claim_run_dir(settings.run_dir)
        self.broadcast = Broadcast()
        database = database if database is not None else open_own_database(settings)
        self._database = database
        self._lease = lease_of(database)
        self.figures = Figures()
        self._store = Store(database, self._clock, self.broadcast.notify, self.figures)
        self.figures.watch_projects(self._store.counts)
        self._once = Once(database, self._clock)
        self._site_owners = SiteOwners(database, self._clock)
        self.identity = IdentityStore(database, self._clock)
        self.identity.ensure_admin()
        self.sign_ins = self._open_sign_ins()
        self.audit = AuditLog(database, self._clock)
        self._programs = self._permitted(programs or orchestrator or open_programs(settings, self.may_act))
        base = self._programs  # one orchestrator is one also behind what asks for permission
        if orchestrator is not None and programs is not None and orchestrator is not programs:
            base = self._permitted(orchestrator)
        self.joined = JoinedNodes(settings.home / "joined", database, self._clock, self.broadcast)
        self._orchestrator = self._permitted(Placing(base, self.joined))
        ports = Ports(settings.home / "ports.json")
        self._builds = ImageBuilds(settings, self._programs, base, ports, self._call_step)
        self._ground: Ground = ProgramGround(settings, ports, self._store, network_names)
        self._nodes: Nodes | None = None
        if self._orchestrator.runs_images:
            from flops.manager.authority import Authority  # managers of programs need none of it

            assert reports_url is not None
            authority = Authority(settings.authority_dir)
            self._ground = ImageGround(settings, base, authority, ports, reports_url)
            self._nodes = Nodes(settings, base, authority, ports, self._builds.runtime_image)
        self._support = Support(settings, self._programs, data=self._nodes is None)
        self._spool = Spool(settings.spool_dir)
        self._tracker = Tracker(self._spool, self._store)
        self._inference = Inference(self._store, self._orchestrator, self._ground, self._clock, self._convert)
        self._reconciler = Reconciler(
            Surroundings(
                settings=settings,
                store=self._store,
                orchestrator=self._orchestrator,
                tracker=self._tracker,
                clock=self._clock,
                step_runner=step_runner or self._step_process,
                places=Places(PREPARING_AT_ONCE),
                ground=self._ground,
                inference=self._inference,
                support=self._ensure_support,
                step_arguments=self._step_arguments,
                check_lease=self._check_lease,
            )
        )
        # Where one runs everything it is asked once: each look goes through all processes.
        programs = self._orchestrator if base is self._programs else self._programs
        self._top = Top(self._store, programs, self._orchestrator, self._clock, self.joined.nodes)
        self._data_calls = threading.BoundedSemaphore(_DATA_CALLS_AT_ONCE)
        self._closing = Cancellation()
        self._results = self._spool.listen_for_results()
        self._results_thread = threading.Thread(
            target=self._follow_results, name="flops-results", daemon=True
        )

    def renew_certificates(self) -> None:
        """Of models that are served for longer than those last; whoever trains is looked at by itself."""
        self._inference.renew_certificates()

    def _open_sign_ins(self) -> "SignIns | None":
        if self.settings.issuer is None:
            return None
        from flops.identity.signing_in import SignIns  # managers with tokens alone need none of it

        return SignIns(self.identity, self.settings.issuer, self._clock)

    def start(self) -> None:
        """Go on with everything that was left; start what the manager itself needs, in the background."""
        orchestrators.remember(self.settings, self._store.unsettled())
        self._remove_orphans()
        self._inference.start_all()
        self._reconciler.start()
        self._results_thread.start()
        threading.Thread(target=self._start_support, name="flops-support", daemon=True).start()

    def close(self) -> None:
        """End the manager; projects and services go on without it."""
        self.broadcast.close()
        self._closing.cancel()
        self._spool.announce_result()
        self._reconciler.close()
        self._results_thread.join()
        self._results.close()
        self._inference.close()
        self.identity.close()
        self._orchestrator.close()
        self._programs.close()
        self._store.close()

    # projects

    def submit(
        self,
        mapping: Mapping[str, Any],
        project: ProjectId | None = None,
        *,
        owner: str = "admin",
        team: str | None = None,
        sight: Sight | None = None,
    ) -> dict[str, Any]:
        """Take a new project.

        Args:
            project: its id; nothing is done where there is such a project already. None: a new one.
            team: whose members may see and change it like its owner.
            sight: the models that it may start from; None: any.
        Raises:
            InvalidInputError: the spec is wrong, names a model that is not there, or wants what this version
                cannot do.
        """
        spec = spec_from_mapping(mapping)
        _check_possible(spec, images=self._orchestrator.runs_images)
        if spec.model.initial is not None:
            packaging.parameters_of(self._store, spec.model.initial, sight)
        project = project or new_project_id()
        with suppress(NotFoundError):
            return self.project(project)
        deployment.write_spec(self.settings, project, spec)
        self._store.create_project(
            project,
            name=spec.name or _family(spec.redacted_repo),
            spec=spec.to_json(redacted=True),
            source=spec.redacted_repo,
            rounds_total=_rounds_of_root(spec),
            owner=owner,
            team=team,
        )
        self._reconciler.take(project)
        return self.project(project)

    def once(self, request: OnceRequest, carry_out: CarryOut) -> tuple[dict[str, Any], bool]:
        """Carry a request out once; see `Once.answer`."""
        return self._once.answer(request, carry_out)

    def project(self, project: ProjectId) -> dict[str, Any]:
        """Raises: NotFoundError: there is no such project."""
        return self.project_for_now(project)[0]

    def project_for_now(self, project: ProjectId) -> tuple[dict[str, Any], bool]:
        """A project, and whether it stays like that until `broadcast` tells of it: nothing runs for it.

        Raises:
            NotFoundError: there is no such project.
        """
        statuses = self._statuses(project)
        with self._store.one_view():
            row = self._store.project(project)
            deployed = self._inference.view(project, statuses)
            view = project_view(
                row,
                steps=self._store.steps(project),
                learners=self._store.learners(project),
                clusters=self._store.clusters(project),
                models=self._store.models(project),
                services=self._store.services(project),
                statuses=statuses,
                deployment=deployed,
                gui=self._support.gui_address,
            )
        return view, row.terminal and row.cleaned and deployed is None

    def page(self, wanted: Wanted) -> Page:
        """Projects as one line shows them, the newest first.

        Raises:
            InvalidInputError: the cursor is none.
        """
        return self._store.page(wanted)

    def stop(self, project: ProjectId) -> dict[str, Any]:
        """Stop a project; it is `stopping` when this returns, and `stopped` soon after.

        Raises:
            ConflictError: it is at its end already.
        """
        before = self._store.project(project)
        if before.state is State.STOPPED:
            return self.project(project)
        if before.terminal:
            raise ConflictError(f"project {project} is {before.state} - there is nothing to stop")
        self._store.observe(project, Observation(stop_requested=True), "stop was requested")
        self._reconciler.cancel(project)
        self._reconciler.take(project)
        return self.project(project)

    def pause(self, project: ProjectId) -> dict[str, Any]:
        """Pause a project; it is `pausing` when this returns, and `paused` soon after. Nothing is lost but
        the step or the round that is under way, which `resume` begins again.

        Raises:
            ConflictError: it has trained already, or is at its end.
        """
        state = self._store.observe(project, Observation(pause_requested=True), "pause was requested")
        if state not in (State.PAUSING, State.PAUSED):
            raise ConflictError(
                f"project {project} is {state} - only a project that prepares or trains can be paused"
            )
        self._reconciler.cancel(project)
        return self.project(project)

    def resume(self, project: ProjectId) -> dict[str, Any]:
        """Let a paused project go on after its last finished step or round, when it is its turn.

        Raises:
            ConflictError: it is not paused.
        """
        before = self._store.project(project)
        if before.state is not State.PAUSED:
            advice = "try again when it is paused" if before.state is State.PAUSING else "nothing to resume"
            if before.state is State.FINISHED:
                advice = f"train more rounds with 'flops extend {project}'"
            if before.state in PAUSABLE:
                advice = f"it goes on by itself, watch it with 'flops attach {project}'"
            raise ConflictError(f"project {project} is {before.state} - {advice}")
        self._store.observe(project, Observation(resume_requested=True), "resume was requested")
        self._reconciler.take(project)
        return self.project(project)

    def extend(self, project: ProjectId, rounds: int) -> dict[str, Any]:
        """Let a finished project train more rounds, to the same model as if all had been asked for at once; a
        paused one trains them when it is resumed.

        Raises:
            ConflictError: it is neither finished nor paused.
            InvalidInputError: these are more rounds than a project can have.
        """
        row = self._store.project(project)
        if row.state not in (State.FINISHED, State.PAUSED):
            advice = "only a finished or paused project can be extended"
            if not row.terminal:
                advice = f"wait until it has finished, or pause it first with 'flops pause {project}'"
            raise ConflictError(f"project {project} is {row.state} - {advice}")
        if (row.training or {}).get(RESTORED):
            raise ConflictError(
                f"project {project} was restored from a backup, which holds no checkpoints - start another "
                "from its model with 'flops run --initial NAME/VERSION'"
            )
        if row.rounds_total + rounds > MAX_ROUNDS:
            raise InvalidInputError(
                f"project {project} has {row.rounds_total} rounds, {rounds} more are over {MAX_ROUNDS} - "
                "ask for fewer"
            )
        if not self._reconciler.wait_settled(project, STOP_TIMEOUT_S):
            raise ConflictError(f"project {project} is still being cleaned up - try again")
        self._store.extend(project, rounds)
        self._reconciler.take(project)
        return self.project(project)

    def retry(self, project: ProjectId) -> dict[str, Any]:
        """Attempt a failed or stopped project once more, from its last finished step or round.

        Raises:
            ConflictError: it is neither.
        """
        row = self._store.project(project)
        if row.state not in RETRIABLE:
            advice = f"train more rounds with 'flops extend {project}'"
            if not row.terminal:
                advice = "only a failed or stopped project can be attempted again"
            raise ConflictError(f"project {project} is {row.state} - {advice}")
        if not self._reconciler.wait_settled(project, STOP_TIMEOUT_S):
            raise ConflictError(f"project {project} is still being cleaned up - try again")
        self._store.retry(project)
        self._reconciler.take(project)
        return self.project(project)

    def remove(self, project: ProjectId, *, force: bool = False) -> None:
        """Forget a project that is at its end: its rows, folder, logs and mock data. Its registered models
        stay.

        Args:
            force: stop it first.
        Raises:
            ConflictError: it is not at its end.
        """
        row = self._store.project(project)
        if force and not row.terminal:
            self.stop(project)
        elif not row.terminal:
            raise ConflictError(
                f"project {project} is {row.state} - stop it first with 'flops stop {project}'"
            )
        if not self._reconciler.wait_settled(project, STOP_TIMEOUT_S):
            raise ConflictError(f"project {project} is still being cleaned up - try again")
        spec = row.spec
        if (spec.get("data") or {}).get("mock") and "fetch" in self._store.steps(project):
            self._call_data("data-drop", {"tag": choosing.mock_tag(project)})
        self._store.delete_project(project)
        self._orchestrator.remove_project(project)
        self._ground.release(project)
        if self.settings.images_dir.exists():
            self._call_step("forget-images", {"project": project})
        self._tracker.remove(project)
        shutil.rmtree(ProjectPaths.of(self.settings, project).folder, ignore_errors=True)

    def remove_all(self) -> None:
        """`remove` all projects, by force.

        Raises:
            ConflictError: one of them is still being cleaned up; others are gone.
        """
        rows = self._store.projects()
        for row in rows:
            with suppress(ConflictError):  # it is at its end
                self.stop(row.id)
        for row in rows:
            with suppress(NotFoundError):  # somebody else removed it
                self.remove(row.id, force=True)

    def events(self, project: ProjectId, after: int = 0, limit: int = 1000) -> list[Event]:
        """Raises: NotFoundError: there is no such project."""
        return self._store.events(project, after, limit)

    def news(self, project: ProjectId, after: int, limit: int) -> tuple[list[Event], bool]:
        """The next events, and whether the project rests with the last one of all: none follows by itself.

        Raises:
            NotFoundError: there is no such project.
        """
        with self._store.one_view():
            return self._store.events(project, after, limit), self._store.state(project) in RESTING

    def belongs_to(self, project: ProjectId) -> tuple[str, str | None]:
        """The owner of a project, and its team.

        Raises:
            NotFoundError: there is no such project.
        """
        return self._store.belongs_to(project)

    def is_resting(self, project: ProjectId) -> bool:
        """Whether nothing happens to the project any more by itself: it is at its end, or paused.

        Raises:
            NotFoundError: there is no such project.
        """
        return self._store.state(project) in RESTING

    def logs(
        self,
        project: ProjectId,
        service: str | None = None,
        tail_lines: int = 200,
        request: str | None = None,
    ) -> dict[str, str]:
        """The last lines of the project's services, by name; what a learner's code printed is under its id,
        and what this manager said of the project under ``manager``.

        Args:
            request: only log lines that were written for the request of this id.
        Raises:
            NotFoundError: the project has no such service.
        """
        self._store.project(project)
        found: dict[str, str] = {}
        for status in self._orchestrator.list(project):
            found[status.name] = self._orchestrator.logs(ServiceName(status.name), 1 << 20)
        folder = ProjectPaths.of(self.settings, project).logs
        for path in sorted(folder.glob("*.log")):
            found[path.stem] = _tail_of(path)
        own = self.settings.logs_dir / "manager.log"
        if own.exists():  # not where somebody else keeps it, such as systemd
            lines = _tail_of(own, _OWN_TAIL_BYTES).splitlines()
            found[_OWN_LOG] = "\n".join(line for line in lines if belongs(line, project=project))
        if service is not None:
            wanted = [name for name in found if service in (name, name.removeprefix(f"{project}-"))]
            if not wanted:
                raise NotFoundError(
                    f"project {project} has no service '{service[:60]}' - it has "
                    + (", ".join(found) or "none yet")
                )
            found = {name: found[name] for name in wanted}
        if request is not None:
            found = {
                name: "\n".join(line for line in text.splitlines() if belongs(line, request=request))
                for name, text in found.items()
            }
        return {name: "\n".join(text.splitlines()[-tail_lines:]) for name, text in found.items()}

    # reports of services

    def check_reporter(self, project: ProjectId, token: str) -> None:
        """Raises: UnauthorizedError: the token is not the project's."""
        if not deployment.report_token_fits(self.settings, project, token):
            raise UnauthorizedError(
                f"the token does not fit project {project} - reports come from its own services only"
            )

    def report(self, project: ProjectId, source: str, reports: Sequence[Report]) -> int:
        """Take over reports; answers the last number that was taken over."""
        accepted = self._store.accept_reports(project, source, reports)
        kinds = {report.kind for report in reports}
        self._reconciler.wake(project, 0.0 if kinds & _ENDING else SOON_S)
        return accepted

    def receive_model(self, project: ProjectId, sha256: str) -> Upload:
        """Where the trained model of a project is written to, part by part.

        Raises:
            InvalidInputError: that is no SHA-256.
        """
        return Upload(ProjectPaths.of(self.settings, project).uploads, sha256)

    # served models

    def deploy(self, project: ProjectId, *, onnx: bool = False) -> dict[str, Any]:
        """Serve the newest model of a project; see `Inference.deploy`."""
        self._store.project(project)
        self._inference.deploy(project, onnx=onnx)
        return self.project(project)

    def undeploy(self, project: ProjectId) -> dict[str, Any]:
        """Serve it no longer; see `Inference.undeploy`."""
        self._store.project(project)
        self._inference.undeploy(project)
        return self.project(project)

    def predict(self, project: ProjectId, content_type: str, body: bytes) -> Answer:
        """See `Inference.predict`."""
        self._store.project(project)
        return self._inference.predict(project, content_type, body)

    # images

    def images(self) -> list[dict[str, Any]]:
        """What the image layout holds, by name."""
        return list(self._call_step("list-images", {})["images"])

    def make_base(self, request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        """Make a base image from Debian's packages; see `flops.images.base.make_base`."""
        return self._call_step("base-image", request, progress)

    # data

    def put_fragment(
        self,
        file: Path,
        tags: Sequence[str],
        site: str,
        *,
        allow_metrics: bool = False,
        labels: Mapping[str, str] | None = None,
        node: str | None = None,
        owner: str | None = None,
    ) -> dict[str, Any]:
        """Store one Parquet file.

        Args:
            node: where; None: where the site's data are, else where the fewest sites are.
            owner: whose the site has to be, or becomes; None: anybody's.
        Raises:
            ForbiddenError: the site is not theirs.
        """
        self._claim([site], owner)
        arguments = {
            "file": str(file),
            "tags": list(tags),
            "site": site,
            "allow_metrics": allow_metrics,
            "labels": dict(labels or {}),
            "node": node,
        }
        return dict(self._call_data("data-put", arguments)["fragment"])

    def fragments(
        self, tags: Sequence[str], site: str | None, *, owner: str | None = None
    ) -> list[dict[str, Any]]:
        """Of all nodes; what joined ones hold as far as they say it.

        Args:
            owner: only what is theirs.
        """
        own = list(self._call_data("data-list", {"tags": list(tags), "site": site})["fragments"])
        if owner is not None:
            theirs = self._site_owners.of(owner)
            own = [fragment for fragment in own if fragment["site"] in theirs]
        return own + held_fragments(self.joined.store.nodes(owner=owner), tags, site)

    def data_tags(self, *, owner: str | None = None) -> list[dict[str, Any]]:
        """What is held under each data tag, by name; see `fragments`."""
        found: dict[str, dict[str, Any]] = {}
        for fragment in self.fragments((), None, owner=owner):
            for tag in fragment["tags"]:
                one = found.setdefault(
                    tag, {"tag": tag, "sites": set(), "fragments": 0, "num_examples": 0, "size_bytes": 0}
                )
                one["sites"].add(fragment["site"])
                one["fragments"] += 1
                one["num_examples"] += fragment["num_examples"]
                one["size_bytes"] += fragment["size_bytes"]
        return [found[tag] | {"sites": sorted(found[tag]["sites"])} for tag in sorted(found)]

    def uses_of_data(self, **wanted: Any) -> list[dict[str, Any]]:
        """What ran on whose data; see `flops.manager.usage.uses_of_data`."""
        return self._store.uses_of_data(**wanted)

    def drop_fragment(self, fragment: str, *, owner: str | None = None) -> None:
        """Remove a fragment, of an owner's if one is named.

        Raises:
            NotFoundError: there is no such fragment, or it is not theirs.
        """
        if owner is not None and all(one["id"] != fragment for one in self.fragments((), None, owner=owner)):
            raise NotFoundError(f"there is no fragment '{fragment[:80]}' of yours - see 'flops data ls'")
        self._call_data("data-drop", {"id": fragment})

    def mock(self, arguments: Mapping[str, Any], *, owner: str | None = None) -> list[dict[str, Any]]:
        """Spread a known data set over sites; see `flops.data.mock`, and for ``owner`` `put_fragment`."""
        self._claim(arguments["sites"], owner)
        return list(self._call_data("data-mock", arguments)["fragments"])

    def holdings_of(self, owner: str) -> Holdings:
        """What of all data is theirs."""
        nodes = self.joined.store.nodes(gone=True)
        return Holdings(
            sites=self._site_owners.of(owner),
            nodes=[node.name for node in nodes if node.owner == owner],
            strange_nodes=[node.name for node in nodes if node.owner != owner],
        )

    def _claim(self, sites: Sequence[str], owner: str | None) -> None:
        if owner is not None:
            self._site_owners.claim(
                sites, owner, lambda: {fragment["site"] for fragment in self.fragments((), None)}
            )

    # models

    def models(
        self,
        name: str | None = None,
        after: str | None = None,
        limit: int = 1000,
        *,
        sight: Sight | None = None,
    ) -> dict[str, Any]:
        """A page of registered models, the newest first, and the cursor of those behind it.

        Args:
            sight: of whoever asks; None, here and below: they see everybody's.
        Raises:
            InvalidInputError: the cursor is none.
        """
        found, following = self._store.page_of_models(name, after, limit, sight)
        return {"models": [model_view(model) for model in found], "next": following}

    def versions(self, name: str, *, sight: Sight | None = None) -> list[dict[str, Any]]:
        """A model's versions, the newest first.

        Raises:
            NotFoundError: there is no such model.
        """
        found = self._store.models(name=name, sight=sight)
        if not found:
            raise NotFoundError(f"there is no model '{name[:80]}' - see 'flops models'")
        return [model_view(model) for model in found]

    def model(self, name: str, version: int, *, sight: Sight | None = None) -> dict[str, Any]:
        """Raises: NotFoundError: there is no such version."""
        return model_view(self._store.model(name, version, sight))

    def model_files(self, name: str, version: int, *, sight: Sight | None = None) -> list[tuple[str, Path]]:
        """The files of a registered model, by their names inside it.

        Raises:
            NotFoundError: there is no such version, or its files are not on this machine.
        """
        model = self._store.model(name, version, sight)
        folder = Path(model.folder) if model.folder else None
        if folder is None or not folder.is_dir():
            raise NotFoundError(
                f"the files of model {name} version {version} are not on this machine - get them from "
                f"MLflow: {model.uri}"
            )
        return [
            (str(path.relative_to(folder)), path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()
        ]

    # the manager itself

    def back_up(self) -> Backup:
        """A backup of this moment; see `flops.manager.backup`."""
        return Backup(self.settings, self._database, self._clock)

    def nodes(self) -> list[dict[str, Any]]:
        """The orchestrator's nodes, by name.

        Raises:
            UnavailableError: the orchestrator is away.
        """
        return sorted((asdict(node) for node in self._orchestrator.nodes()), key=lambda node: node["name"])

    def joined_nodes(self, owner: str | None = None) -> list[dict[str, Any]]:
        """Machines that joined and have not left, by name.

        Args:
            owner: only theirs.
        """
        now = self._clock.now()
        return [joined_node_view(node, now) for node in self.joined.store.nodes(owner=owner)]

    def add_join_token(self, node: str, owner: str, lasts_s: float) -> tuple[JoinToken, str]:
        """A token with which one machine joins, and its text; see `NodeStore.add_token`.

        Raises:
            NotFoundError: there is no such owner.
            InvalidInputError: whose role does not go with nodes.
            ConflictError: a node of this name is there.
        """
        user = self.identity.user(owner)
        if user.role not in (Role.ADMIN, Role.DATA_OWNER):
            raise InvalidInputError(
                f"{owner} is {user.role}, nodes belong to data owners - see 'flops user set {owner} --role'"
            )
        if any(node == one.name for one in self._orchestrator.nodes()):
            raise ConflictError(f"node '{node}' is the orchestrator's - choose another name")
        return self.joined.store.add_token(node, owner, lasts_s)

    def code_for(self, node: JoinedNode, project: ProjectId) -> Path:
        """The archive of the code that a joined node is wanted to run.

        Raises:
            NotFoundError: it is not wanted for that project.
        """
        self._check_wanted(node, project)
        return code_of(self.settings, project, self._store.steps(project)).path

    def lock_for(self, node: JoinedNode, project: ProjectId) -> dict[str, str]:
        """The packages of a project that a joined node is wanted for.

        Raises:
            NotFoundError: it is not wanted for that project.
        """
        self._check_wanted(node, project)
        from flops.images.locks import LockStore

        results = self._store.steps(project)
        lock = LockStore(self.settings.locks_dir).get(str(results.get("lock", {}).get("hash")))
        if lock is None:
            raise NotFoundError(f"the lock of project {project} is not there any more - run it anew")
        return {"python": lock.python, "platform": lock.platform, "text": lock.text}

    def _check_wanted(self, node: JoinedNode, project: ProjectId) -> None:
        if self.joined.assignment(node, project) is None:
            raise NotFoundError(f"node {node.name} is not wanted for project {project}")

    def top(self, sees: Callable[[str, str | None], bool], *, own: bool) -> dict[str, Any]:
        """What nodes and services use now; see `Top.view`."""
        return self._top.view(sees, own=own)

    def readiness(self) -> dict[str, str | None]:
        """Why something that the manager needs is away, by its name; None: it is there."""
        checks: dict[str, Callable[[], object]] = {
            "database": self._store.counts,
            "orchestrator": self._orchestrator.nodes,
            "recorder": self._check_recorder,
        }
        found: dict[str, str | None] = {}
        for name, check in checks.items():
            try:
                check()
            except FlopsError as error:
                found[name] = str(error)
            except Exception as error:
                log.exception("%s", name)
                found[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = None
        return found

    @property
    def gui_address(self) -> str:
        """Of MLflow's GUI: a path of this manager's, or a server elsewhere that is the tracking store."""
        return self._support.gui_address

    @property
    def gui_door(self) -> GuiDoor:
        """Where MLflow's GUI answers, if it runs."""
        return self._support.gui_door

    def start_gui(self) -> None:
        """MLflow's GUI answers when this returns.

        Raises:
            UnavailableError: it does not get ready.
        """
        self._support.start_gui()

    def shut_down(self, *, force: bool = False) -> None:
        """Stop the manager's own services; nothing of this FLOPS_HOME runs afterwards but the manager.

        Args:
            force: stop projects that are not at rest, instead of refusing; leave an orchestrator alone that
                is away.
        Raises:
            ConflictError: projects are not at rest.
            UnavailableError: the orchestrator is away.
        """
        active = [row for row in self._store.projects() if not row.resting]
        if active and not force:
            names = ", ".join(row.id for row in active[:5])
            raise ConflictError(
                f"{len(active)} project{'s are' if len(active) > 1 else ' is'} not at the end ({names}) - "
                "pause or stop with 'flops pause ID' or 'flops stop ID' first, or use --force"
            )
        for row in active:
            with suppress(ConflictError):  # it came to its end by itself meanwhile
                self.stop(row.id)
        for project in self._store.unsettled():  # also those that have just failed
            self._reconciler.wait_settled(project, STOP_TIMEOUT_S)
        try:
            self._inference.stop_all()
            if self._nodes is not None:
                self._nodes.stop()
        except UnavailableError as error:
            if not force:
                raise
            log.warning("services of the orchestrator are left as they are: %s", error)
        self._support.stop()

    def active(self) -> bool:
        """Whether a project is neither at its end nor paused."""
        return any(not row.resting for row in self._store.projects())

    def announce(self, url: str) -> None:
        """Let managers that stand by know where this one answers."""
        if self._lease is not None:
            self._lease.announce(url)

    def may_act(self) -> bool:
        """Whether no other manager may do so now."""
        return self._lease is None or self._lease.holds

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _permitted(self, orchestrator: Orchestrator) -> Orchestrator:
        if self._lease is None:
            return orchestrator
        return PermittedOrchestrator(orchestrator, self._lease.check)

    def _statuses(self, project: ProjectId) -> dict[str, ServiceStatus]:
        """What the orchestrator says of services; nothing while it is away."""
        try:
            return {one.name: one for one in self._orchestrator.list(project)}
        except UnavailableError as error:
            log.info("project %s: %s", project, error)
            return {}

    def _step_process(self, project: ProjectId) -> StepRunner:
        return StepProcess(
            ProjectPaths.of(self.settings, project).logs / "preparation.log", self._lease, nice=_NICE
        )

    def _call_data(self, step: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self._ensure_support(recorder=False)
        return self._call_step(step, {**arguments, **self._step_arguments(DATA)})

    def _call_step(
        self,
        step: str,
        arguments: Mapping[str, Any],
        progress: Callable[[str], None] = lambda message: None,
    ) -> dict[str, Any]:
        def tell(message: str) -> None:
            log.info("%s: %s", step, message)
            progress(message)

        with self._data_calls, self._one_step_process() as process:
            return process.run(
                step,
                {"home": str(self.settings.home), "arguments": dict(arguments)},
                tell,
                self._closing,
            )

    @contextmanager
    def _one_step_process(self) -> Iterator[StepProcess]:
        process = StepProcess(self.settings.logs_dir / "data-calls.log", self._lease)
        try:
            yield process
        finally:
            process.close()

    def _convert(self, project: ProjectId, model: Path) -> None:
        paths = ProjectPaths.of(self.settings, project)
        request = {
            "home": str(self.settings.home),
            "project": project,
            "spec": deployment.read_spec(self.settings, project),
            "results": self._store.steps(project),
            "arguments": {"model": str(model), "target": str(paths.folder / ONNX)},
        }
        with self._one_step_process() as process:
            made = process.run(
                ONNX, request, lambda message: log.info("%s: %s", project, message), self._closing
            )
        write_private_json(config_file(self.settings, project, ONNX), made)

    def _ensure_support(self, *, recorder: bool = True) -> None:
        self._support.ensure(recorder=recorder)
        if self._nodes is not None:
            self._nodes.ensure()

    def _step_arguments(self, step: str, project: ProjectId | None = None) -> dict[str, Any]:
        """What a step has to know of nodes and of images, beside its project."""
        if step == ENVIRONMENT:
            return {"runs_images": self._orchestrator.runs_images}
        if step in (IMAGES, AGGREGATOR_IMAGE, MODEL_IMAGE):
            return self._builds.arguments()
        found: dict[str, Any] = {}
        if step in (DATA, CLUSTERS) and self._nodes is not None:
            found[SOURCES] = self._nodes.sources()
        if step in (DATA, CLUSTERS) and project is not None:
            found[OFFERS] = asdict(self._offers(project))
        return found

    def _offers(self, project: ProjectId) -> Offers:
        """What joined nodes offer a project."""
        row = self._store.project(project)
        spec = spec_from_mapping(deployment.read_spec(self.settings, project))
        if spec.data.mock is not None or not spec.data.tags:
            return Offers()
        nodes = self.joined.store.nodes()
        return offers_of(nodes, row, spec, self._clock.now(), images=self._orchestrator.runs_images)

    def _start_support(self) -> None:
        try:
            self._ensure_support(recorder=bool(self._store.unsettled() or self._spool.projects()))
        except FlopsError as error:
            log.warning("%s", error)

    def _check_recorder(self) -> None:
        if self._spool.projects():  # the first project starts it
            self._support.check_recorder()

    def _follow_results(self) -> None:
        while not self._closing.is_set:
            try:
                self._take_late_results()
            except FlopsError as error:
                log.warning("%s", error)
            self._results.wait(60.0)
            self._reconciler.wake_all()

    def _take_late_results(self) -> None:
        """Models that were registered after their project's end, because MLflow was away."""
        for project in self._store.projects():
            if (
                project.state is State.FINISHED
                and project.tracking is None
                and REGISTER in self._store.steps(project.id)
                and (outcome := self._tracker.result(project.id)) is not None
                and packaging.arrived(project, outcome)
            ):
                packaging.take_over(self.settings, self._store, self._clock, project, outcome)

    def _remove_orphans(self) -> None:
        """Folders of projects whose submission was cut off before its commit."""
        known = {row.id for row in self._store.projects()}
        for folder in self.settings.projects_dir.iterdir():
            if folder.is_dir() and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)


def _check_possible(spec: ProjectSpec, *, images: bool) -> None:
    if images and spec.training.virtual:
        raise InvalidInputError(
            "training.virtual shares processes between learners, which containers do not - leave it out, or "
            "run the project on the orchestrator 'process'"
        )
    check_strategy(spec.training.strategy.name, spec.training.strategy.parameters)


def _rounds_of_root(spec: ProjectSpec) -> int:
    """What counts as the project's rounds: in a hierarchy the cycles."""
    training = spec.training
    return training.cycles if training.mode == "hierarchical" else training.rounds


def _family(repository: str) -> str:
    """The repository's own name: projects of it share an experiment."""
    name = repository.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1].removesuffix(".git")
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)
    return name.strip("._-")[:63] or "project"


def _tail_of(path: Path, tail_bytes: int = 1 << 20) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - tail_bytes))
        return file.read().decode(errors="replace")


def _claim_run_dir(folder: Path) -> None:
    """See to it that nobody else can put sockets there: it may lie in the system's temporary folder."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConflictError(f"'{folder}' belongs to somebody else - remove it, or choose another FLOPS_HOME")
    folder.chmod(0o700)
