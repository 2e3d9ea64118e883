"""The learners of a node: what is wanted is begun, what is not wanted ends, and how each stands is said.

A learner goes through: refused by its owner's consent, or prepared (code, environment, configuration) by a
thread of its own, then a service of the node's orchestrator. Each has a record on the disk before it has an
effect, so a node that was killed knows again whose service is whose. An ended learner is not begun again
here: the manager decides that, by another digest.
"""

import json
import logging
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flops.core.consent import Consent
from flops.core.errors import FailedError, FlopsError, NotFoundError, UnavailableError
from flops.core.ids import ServiceName
from flops.federation import AgentConfig, DataAccess
from flops.federation.config import Tls
from flops.federation.tally import Counts, read_tally
from flops.images.locks import write_atomically
from flops.node.assignment import CA, CERTIFICATE, CONFIG, KEY, Assignment, Told, identity
from flops.node.code import lay_down
from flops.node.data import OWN, NodeData
from flops.node.environments import checked_lock, forget_environments, make_environment
from flops.node.home import Membership, NodeHome
from flops.node.journal import Journal
from flops.node.link import Manager
from flops.node.meter import Meter
from flops.orchestration import LIVE_STATES, Orchestrator, ServiceSpec, ServiceStatus

log = logging.getLogger(__name__)

AGENT = "agent"
_GRACE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_MAX_REASON = 1000
_LOG_BYTES = 65536
_MAX_LOG_CHARS = 65536


class _CancelledError(Exception):
    """The learner is not wanted any more."""


@dataclass
class _Held:
    """One learner that is wanted here; guarded by the lock of `Learners`."""

    name: ServiceName
    digest: str
    assignment: Assignment | None
    entry: str | None = None
    """In the journal; None: it is in none, or has ended there."""
    before: Counts = field(default_factory=Counts)
    """What earlier attempts had counted."""
    state: str = "pending"
    reason: str = ""
    deployed: bool = False
    """It is a service: the orchestrator knows more than `state` and `reason`."""
    environment: str | None = None
    """The hash of the one that it runs in."""
    ending: str = ""
    """Why we are ending it."""
    waits: bool = False
    """It was being prepared when the node ended: begun again once it is known to be wanted still."""
    cancel: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Learners:
    """All learners of this node; safe from any thread: `want`, `reconsider` and `end_all` take turns.

    Args:
        consent: what the owner allows at this moment.
        changed: called, from any thread, when `reports` would say something new.
    """

    def __init__(
        self,
        home: NodeHome,
        membership: Membership,
        orchestrator: Orchestrator,
        manager: Manager,
        data: NodeData,
        *,
        consent: Callable[[], Consent],
        changed: Callable[[], None],
        journal: Journal | None = None,
    ) -> None:
        self._home = home
        self._membership = membership
        self._orchestrator = orchestrator
        self._manager = manager
        self._data = data
        self._consent = consent
        self._changed = changed
        self._journal = journal or Journal(home.journal_file)
        self._meter = Meter(orchestrator)
        self._turn = threading.Lock()
        self._lock = threading.RLock()
        self._held: dict[ServiceName, _Held] = {}
        self._projects: dict[str, threading.Lock] = {}
        self._over = False
        self._adopt()
        self._subscription = orchestrator.watch(self._seen)
        with self._lock:
            for status in self._statuses().values():
                self._seen(status)  # what ended while nobody watched

    # what is wanted

    def want(self, wanted: Sequence[Any]) -> None:
        """Make it so; returns when what is not wanted any more has ended. The rest is begun, not awaited."""
        with self._turn:
            if self._over:
                return
            found: dict[ServiceName, tuple[str, Any]] = {}
            for one in wanted:
                try:
                    name, digest = identity(one)
                except FlopsError as error:
                    log.warning("not done: %s", error)
                    continue
                found[name] = (digest, one)
            with self._lock:
                over = [
                    held
                    for held in self._held.values()
                    if held.name not in found or found[held.name][0] != held.digest
                ]
            self._end(over, "it is no longer wanted")
            for name, (digest, one) in found.items():
                with self._lock:
                    held = self._held.get(name)
                if held is None or held.waits:
                    self._begin(name, digest, one, held)
            self._tidy()

    def reconsider(self) -> None:
        """The owner allows something else: end what they do not allow any more."""
        with self._turn:
            consent = self._consent()
            with self._lock:
                refused = [
                    (held, reason)
                    for held in self._held.values()
                    if self._is_live(held) and (reason := _refusal(consent, held.assignment))
                ]
            for held, reason in refused:
                log.info("service %s ends: %s", held.name, reason)
                self._end([held], reason, keep=True)
                with self._lock:
                    held.state, held.reason, held.deployed = "failed", reason, False
                    self._save(held)
            if refused:
                self._changed()

    def end_all(self, reason: str) -> None:
        """Nothing of any project runs here any more, and nothing is begun again."""
        with self._turn:
            self._over = True
            with self._lock:
                everyone = list(self._held.values())
            self._end(everyone, reason)
            self._tidy()

    def close(self) -> None:
        """Let go of the learners; those that are services go on."""
        self._subscription.close()
        with self._lock:
            everyone = list(self._held.values())
        for held in everyone:
            held.cancel.set()
        for held in everyone:
            if held.thread is not None:
                held.thread.join()

    # how it stands

    def reports(self) -> list[dict[str, Any]]:
        """How each wanted learner stands and what it uses, as the manager is told."""
        with self._lock:
            services = self._statuses()
            reports = [_report(held, services.get(held.name)) for held in self._held.values()]
            if not any(report["state"] == "running" for report in reports):
                return reports
            used = self._meter.look()
            for held, report in zip(self._held.values(), reports, strict=True):
                if report["state"] == "running" and (found := used.get(held.name)) is not None:
                    counts = self._counts(held)
                    bytes_ = {"received_bytes": counts.bytes_in, "sent_bytes": counts.bytes_out}
                    report["usage"] = {**found, **bytes_}
            return reports

    def any_running(self) -> bool:
        with self._lock:
            return any(status.live for status in self._statuses().values())

    def running(self) -> list[dict[str, Any]]:
        """The same, as the owner is told: what it is, and what it has sent."""
        with self._lock:
            services = self._statuses()
            return [
                {
                    **_report(held, services.get(held.name)),
                    **(held.assignment.to_json() if held.assignment else {}),
                    "entry": held.entry,
                    **asdict(self._counts(held)),
                }
                for held in self._held.values()
            ]

    def logs(self, names: Iterable[str]) -> dict[str, str]:
        """What the agents of these learners wrote last. What the user's code prints stays here: it may hold
        rows of the data."""
        found = {}
        for name in names:
            with self._lock:
                held = self._held.get(ServiceName(name))
            if held is None:
                continue
            text = held.reason if not held.deployed else ""
            if held.deployed:
                with suppress(FlopsError):
                    text = self._orchestrator.logs(held.name, _LOG_BYTES)
            found[str(held.name)] = text[-_MAX_LOG_CHARS:]
        return found

    # beginning

    def _begin(self, name: ServiceName, digest: str, wanted: Any, before: _Held | None) -> None:
        try:
            assignment = Assignment.of(wanted)
            told = Told.of(assignment.files.get(CONFIG, b""))
        except FlopsError as error:
            log.warning("service %s is not started: %s", name, error)
            with self._lock:
                self._held[name] = _Held(name, digest, None, state="failed", reason=str(error)[:_MAX_REASON])
            self._changed()
            return
        held = _Held(name, digest, assignment, entry=before.entry if before else None)
        refusal = _refusal(self._consent(), assignment)
        if refusal is not None:
            log.info("service %s is refused: %s", name, refusal)
            held.state, held.reason = "failed", refusal
            self._journal.refused(assignment, refusal)
        else:
            held.before = read_tally(self._tally(assignment))
            held.entry = held.entry or self._journal.began(assignment)
            held.reason = "being prepared"
        with self._lock:
            self._held[name] = held
            self._save(held)
        if refusal is None:
            held.thread = threading.Thread(
                target=self._prepare, args=(held, assignment, told), name=f"prepare-{name}", daemon=True
            )
            held.thread.start()
        self._changed()

    def _prepare(self, held: _Held, assignment: Assignment, told: Told) -> None:
        """Prepare a learner and start it; in a thread of its own."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._start(held, assignment, told)
                return
            except _CancelledError:
                return
            except UnavailableError as error:
                if held.cancel.is_set():
                    return
                log.info("service %s waits: %s", held.name, error)
                self._say(held, f"waits: {error}")
            except FlopsError as error:
                if not held.cancel.is_set():
                    self._fail(held, str(error))
                return
            except Exception as error:
                log.exception("service %s cannot be prepared", held.name)
                self._fail(held, f"this node failed to prepare it: {type(error).__name__} - see its log")
                return
            if held.cancel.wait(pause_s * random.uniform(0.5, 1.5)):  # noqa: S311
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _start(self, held: _Held, assignment: Assignment, told: Told) -> None:
        def check() -> None:
            if held.cancel.is_set():
                raise _CancelledError

        with self._project_lock(assignment.project):  # the next learner of the project finds it all done
            check()
            self._say(held, "fetching the code")
            code = self._code(assignment, check)
            check()
            self._say(held, "making the environment")
            lock = checked_lock(self._manager.lock(assignment.project), assignment.lock)
            made = make_environment(
                lock,
                self._home.settings.environments_dir,
                progress=lambda message: self._say(held, message[:200]),
                cancel=held.cancel,
            )
        if made.warning:
            log.warning("service %s: %s", held.name, made.warning)
        config = self._configure(assignment, told, code, made.environment.python)
        spec = ServiceSpec(
            name=held.name,
            command=(sys.executable, "-P", "-m", "flops.agent", "--config", str(config)),
            role=AGENT,
            project=assignment.project,
            # A version of its own: the orchestrator takes what has not changed for what it runs already.
            environment={"FLOPS_ATTEMPT": held.digest, "no_grpc_proxy": self._membership.host},
            directory=config.parent,
        )
        with self._lock:
            check()
            held.environment = made.environment.hash
            self._orchestrator.deploy(spec)
            held.deployed, held.reason = True, made.warning
            self._save(held)
        self._changed()

    def _code(self, assignment: Assignment, check: Callable[[], None]) -> Path:
        folder = self._folder(assignment.project)
        place = folder / f"code-{assignment.code_sha256[:16]}"
        if place.is_dir():
            return place
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(folder).free
        if free < 3 * assignment.code_bytes:
            raise UnavailableError(
                f"the code has {assignment.code_bytes} bytes, {free} are free in {folder} - free some there"
            )
        archive = folder / "code.tar"
        try:
            self._manager.code(assignment, archive, check)
            lay_down(archive, place)
        finally:
            archive.unlink(missing_ok=True)
        return place

    def _configure(self, assignment: Assignment, told: Told, code: Path, python: Path) -> Path:
        folder = self._learner_folder(assignment)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (CA, CERTIFICATE, KEY):
            if name not in assignment.files:
                raise FailedError(f"the manager sent no {name} - are both of the same version?")
            try:
                write_atomically(folder / name, assignment.files[name].decode("ascii"))
            except UnicodeDecodeError as error:
                raise FailedError(f"{name} that the manager sent is no PEM file") from error
        config = folder / CONFIG
        AgentConfig(
            project=assignment.project,
            learner=assignment.learner,
            token=told.token,
            aggregator=f"grpc+tls://{self._membership.host}:{told.port}",
            python=str(python),
            code=str(code),
            data=DataAccess(
                location=self._data.location,
                token=self._data.token(),
                tags=self._consent().shown(assignment.tags),
                site=assignment.site,
            ),
            tls=Tls(cert=str(folder / CERTIFICATE), key=str(folder / KEY), ca=str(folder / CA)),
            threads=told.threads,
            memory_mb=told.memory_mb,
            seed=told.seed,
            log=str(folder / "code.log"),
            isolate=True,
            insist=True,
            tally=str(self._tally(assignment)),
        ).write(config)
        return config

    # ending

    def _end(self, over: Sequence[_Held], reason: str, *, keep: bool = False) -> None:
        """End learners, whatever they are at, and forget them; the turn is ours.

        Args:
            keep: the record stays, to say how it ended.
        """
        for held in over:
            held.ending = reason
            held.cancel.set()
        for held in over:
            if held.thread is not None:
                held.thread.join()
        services = self._statuses()
        live = [held.name for held in over if held.name in services and services[held.name].live]
        self._orchestrator.stop_many(live, _GRACE_S)
        for held in over:
            self._close_entry(held, reason)
            if held.name in services:
                with suppress(NotFoundError):
                    self._orchestrator.remove(held.name)
            if not keep:
                with self._lock:
                    self._held.pop(held.name, None)
                    self._record(held.name).unlink(missing_ok=True)

    def _seen(self, status: ServiceStatus) -> None:
        """A service of the orchestrator changed; this is its thread."""
        if status.project == OWN:
            return
        with self._lock:
            held = self._held.get(status.name)
            if held is not None and held.deployed and not status.live:
                log.info("service %s has ended: %s %s", status.name, status.state, status.reason)
                over = "the project is over" if status.state == "exited" else status.reason
                self._close_entry(held, held.ending or over)
                self._save(held)
        self._changed()

    def _close_entry(self, held: _Held, reason: str) -> None:
        with self._lock:
            entry, held.entry = held.entry, None
        if entry is not None and held.assignment is not None:
            self._journal.ended(entry, reason, self._counts(held))

    def _fail(self, held: _Held, reason: str) -> None:
        log.warning("service %s is not started: %s", held.name, reason)
        self._close_entry(held, reason)
        with self._lock:
            held.state, held.reason = "failed", reason[:_MAX_REASON]
            self._save(held)
        self._changed()

    def _say(self, held: _Held, reason: str) -> None:
        with self._lock:
            if held.deployed or held.reason == reason:
                return
            held.reason = reason[:_MAX_REASON]
        self._changed()

    def _tidy(self) -> None:
        """Remove what belongs to no wanted learner."""
        with self._lock:
            projects = {held.assignment.project for held in self._held.values() if held.assignment}
            used = {held.environment for held in self._held.values() if held.environment}
        root = self._home.settings.projects_dir
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.name not in projects:
                shutil.rmtree(folder, ignore_errors=True)
        try:
            forget_environments(self._home.settings.environments_dir, used)
        except OSError as error:
            log.warning("old environments were not removed: %s", error)

    # records

    def _adopt(self) -> None:
        """Find again what an earlier program of this node held."""
        services = self._statuses()
        for path in sorted(self._home.records_dir.glob("*.json")):
            try:
                held = _held_of(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("the record %s cannot be read (%s): its service is ended", path, error)
                path.unlink(missing_ok=True)
                continue
            # It may have been killed between the start of the service and the note of it.
            held.deployed = held.name in services
            held.waits = not held.deployed and held.state == "pending"
            self._held[held.name] = held
        for name, status in services.items():
            if name not in self._held:
                log.warning("service %s belongs to nobody: it is ended", name)
                with suppress(FlopsError):
                    self._orchestrator.remove(status.name)

    def _save(self, held: _Held) -> None:
        content = {
            "name": held.name,
            "digest": held.digest,
            "assignment": held.assignment.to_json() if held.assignment else None,
            "entry": held.entry,
            "before": asdict(held.before),
            "state": held.state,
            "reason": held.reason,
            "environment": held.environment,
        }
        try:
            write_atomically(self._record(held.name), json.dumps(content, indent=1) + "\n")
        except OSError as error:
            log.error("the record of service %s was not written: %s", held.name, error)

    def _record(self, name: str) -> Path:
        return self._home.records_dir / f"{name}.json"

    def _folder(self, project: str) -> Path:
        return self._home.settings.projects_dir / project

    def _learner_folder(self, assignment: Assignment) -> Path:
        return self._folder(assignment.project) / assignment.learner

    def _tally(self, assignment: Assignment) -> Path:
        return tally_file(self._home, assignment.project, assignment.learner)

    def _counts(self, held: _Held) -> Counts:
        """What this attempt has counted."""
        if held.assignment is None:
            return Counts()
        return read_tally(self._tally(held.assignment)).since(held.before)

    def _statuses(self) -> dict[ServiceName, ServiceStatus]:
        return {status.name: status for status in self._orchestrator.list() if status.project != OWN}

    def _is_live(self, held: _Held) -> bool:
        status = self._statuses().get(held.name) if held.deployed else None
        return status.live if status is not None else held.state in LIVE_STATES

    def _project_lock(self, project: str) -> threading.Lock:
        with self._lock:
            return self._projects.setdefault(project, threading.Lock())


def tally_file(home: NodeHome, project: str, learner: str) -> Path:
    """Where the agent of a learner counts."""
    return home.settings.projects_dir / project / learner / "tally"


def _held_of(record: dict[str, Any]) -> _Held:
    assignment = record["assignment"]
    return _Held(
        ServiceName(record["name"]),
        record["digest"],
        Assignment.from_json(assignment) if assignment is not None else None,
        entry=record["entry"],
        before=Counts(**record["before"]),
        state=record["state"],
        reason=record["reason"],
        environment=record["environment"],
    )


def _refusal(consent: Consent, assignment: Assignment | None) -> str | None:
    if assignment is None:
        return None
    return consent.refusal(
        owner=assignment.owner,
        team=assignment.team,
        repository=assignment.repository,
        tags=assignment.tags,
    )


def _report(held: _Held, status: ServiceStatus | None) -> dict[str, Any]:
    report: dict[str, Any] = {
        "name": held.name,
        "digest": held.digest,
        "state": held.state,
        "exit_code": None,
        "reason": held.reason,
        "restarts": 0,
        "started_at": None,
    }
    if held.deployed and status is not None:
        report |= {
            "state": status.state,
            "exit_code": status.exit_code,
            "reason": (status.reason or held.reason)[:_MAX_REASON],
            "restarts": status.restarts,
            "started_at": status.started_at,
        }
    elif held.deployed:
        report |= {"state": "lost", "reason": "it is gone from this node"}
    return report
