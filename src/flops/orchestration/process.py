"""The embedded orchestrator: services are plain processes of this machine; no daemon, no root.

A service runs in a session of its own, with its output in a log file and its record in a state file,
and does not notice when the manager dies; the next `ProcessOrchestrator` on the same folders adopts it.
The intent is written before the process is started and every process carries a marker in its
environment, so a crash at any point leaves nothing that is not found again.

Concurrency: one lock guards all records; one thread (`ExitWatch`) sees the ends, restarts and calls the
watchers; callers of `stop` wait for that thread. Belongs to one manager at a time (its lock on
FLOPS_HOME keeps that, or its lease: ``may_act``).
"""

import errno
import hashlib
import logging
import os
import platform
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flops.core.clock import Clock, SystemClock
from flops.core.disk import DiskFullError, disk_full, is_full
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.core.ids import ServiceName
from flops.orchestration import consumption, linux, logfile
from flops.orchestration.ending import SETTLED_S, judge, restarted_after
from flops.orchestration.exits import ExitWatch
from flops.orchestration.port import (
    LOOPBACK,
    Node,
    ServiceSpec,
    ServiceStatus,
    ServiceUsage,
    Statuses,
    Subscription,
    Watcher,
    loopback_address,
    unknown_service,
)
from flops.orchestration.records import Record
from flops.orchestration.service_files import ServiceFiles
from flops.orchestration.watchers import Watchers

_log = logging.getLogger(__name__)

_PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
_LOG_LIMIT_BYTES = 10 << 20
_LOG_CHECK_S = 30.0
_KILL_TIMEOUT_S = 5.0
_DISK_FULL_PAUSE_S = 5.0
_REFUSED_PAUSE_S = 0.1


@dataclass
class _Service:
    record: Record
    pidfd: int | None = None
    restart_at: float | None = None
    """On the clock's monotonic time; only while pending."""


class ProcessOrchestrator:
    """See `Orchestrator`. The constructor adopts what an earlier one left running.

    Args:
        state_dir: one JSON file per service; made with mode 700.
        logs_dir: one log per service, each cut to its last half where it outgrows 10 MB.
        backoff_s: pause before a first restart; doubles with each further one, until an attempt has lived for
            `SETTLED_S`.
        labels: what `nodes` says about this machine.
        may_act: whether this manager may; while it may not, ends are not looked at and nothing is restarted.
    """

    def __init__(
        self,
        state_dir: Path,
        logs_dir: Path,
        *,
        clock: Clock | None = None,
        backoff_s: float = 0.5,
        log_limit_bytes: int = _LOG_LIMIT_BYTES,
        labels: Mapping[str, str] | None = None,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._clock = clock or SystemClock()
        self._may_act = may_act
        self._backoff_s = backoff_s
        self._log_limit_bytes = log_limit_bytes
        self._labels = dict(labels or {})
        self._records = ServiceFiles(state_dir, Record.from_json)
        self._logs_dir = logs_dir
        logs_dir.mkdir(parents=True, exist_ok=True)
        # Two managers of one machine may use the same names: the marker tells their folders apart.
        self._home = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]

        self._watchers = Watchers()
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._services: dict[ServiceName, _Service] = {}
        self._news: deque[ServiceStatus] = deque()
        self._logs_checked_at = self._clock.monotonic()

        self._exits = ExitWatch(self._step, name="flops-services")
        with self._changed:
            self._adopt()
        self._exits.start()

    # the port
    @property
    def runs_images(self) -> bool:
        return False

    @property
    def host(self) -> str:
        return LOOPBACK

    def address(self, spec: ServiceSpec) -> str:
        return loopback_address(spec)

    def expect(self, image: str) -> None:
        """Programs of this machine need no image."""

    def deploy(self, spec: ServiceSpec) -> None:
        if spec.image is not None:
            raise InvalidInputError(
                f"service {spec.name} is an image, and this orchestrator runs programs - choose another"
            )
        if spec.node is not None:
            raise InvalidInputError(
                f"service {spec.name} belongs on node {spec.node}, and this orchestrator is one machine - "
                "see 'flops node ls'"
            )
        with self._changed:
            before = self._services.get(spec.name)
            if before is not None and before.record.live:
                if before.record.stopping:
                    raise ConflictError(f"service {spec.name} is being stopped - deploy it once it has ended")
                if before.record.spec != spec:
                    raise ConflictError(
                        f"service {spec.name} is {before.record.state} with another spec - stop it first"
                    )
                return
            service = _Service(Record(spec))
            self._services[spec.name] = service
            try:
                self._launch(service)
            except FlopsError:
                if before is None:
                    del self._services[spec.name]
                    self._records.delete(spec.name)
                else:
                    self._services[spec.name] = before
                    self._save_late(before.record)
                raise
        self._exits.wake()

    def stop(self, name: ServiceName, grace_s: float = 2.0) -> None:
        self.stop_many([name], grace_s)

    def stop_many(self, names: Iterable[ServiceName], grace_s: float = 2.0) -> None:
        if self._exits.runs_here():
            raise RuntimeError("a watcher must not stop services: it would wait for itself")
        with self._changed:
            services = [service for name in names if (service := self._get(name)).record.live]
            for service in services:
                self._ask_to_end(service)
            self._exits.wake()
            if self._changed.wait_for(lambda: _all_ended(services), timeout=grace_s):
                return
            for service in services:
                self._signal(service, signal.SIGKILL)
            if self._changed.wait_for(lambda: _all_ended(services), timeout=_KILL_TIMEOUT_S):
                return
            stuck = ", ".join(s.record.spec.name for s in services if s.record.live)
        raise FailedError(
            f"services {stuck} did not end within {_KILL_TIMEOUT_S:g} s of SIGKILL - see 'ps' for why"
        )

    def remove(self, name: ServiceName) -> None:
        self.stop(name)
        with self._changed:
            service = self._get(name)
            if service.record.live:
                raise ConflictError(f"service {name} was deployed again meanwhile - remove it anew")
            del self._services[name]
            self._records.delete(name)
            self._log_path(name).unlink(missing_ok=True)

    def list(self, project: str | None = None) -> Statuses:
        with self._changed:
            statuses = [
                service.record.status()
                for service in self._services.values()
                if project in (None, service.record.spec.project)
            ]
        statuses.sort(key=lambda status: status.name)
        return statuses

    def watch(self, callback: Watcher) -> Subscription:
        return self._watchers.add(callback)

    def logs(self, name: ServiceName, tail_bytes: int = 65536) -> str:
        with self._changed:
            self._get(name)
        return logfile.read_tail(self._log_path(name), tail_bytes)

    def remove_project(self, project: str) -> None:
        for status in self.list(project):
            with suppress(NotFoundError):
                self.remove(status.name)

    def nodes(self) -> Sequence[Node]:
        machine = platform.machine()
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [
            Node(
                name=platform.node() or "localhost",
                platform=_PLATFORMS.get(machine, f"linux/{machine}"),
                cpus=len(os.sched_getaffinity(0)),
                memory_mb=memory_bytes // 1_000_000,
                labels=self._labels,
            )
        ]

    def usage(self) -> Sequence[ServiceUsage]:
        with self._changed:
            running = {
                name: service.record.process.pid
                for name, service in self._services.items()
                if service.pidfd is not None and service.record.process is not None
            }
        return consumption.consumed(running) if running else []

    def close(self) -> None:
        self._exits.close()

    # records
    def _get(self, name: ServiceName) -> _Service:
        service = self._services.get(name)
        if service is None:
            raise unknown_service(name)
        return service

    def _log_path(self, name: ServiceName) -> Path:
        return self._logs_dir / f"{name}.log"

    def _marker(self, name: str) -> str:
        return f"{name}@{self._home}"

    def _announce(self, service: _Service) -> None:
        self._news.append(service.record.status())
        self._changed.notify_all()

    def _save_late(self, record: Record) -> None:
        """Save what has already happened; a full disk must not stop us from seeing the rest."""
        try:
            self._records.save(record)
        except OSError:
            _log.exception("the state of service %s was not saved", record.spec.name)

    # starting
    def _launch(self, service: _Service) -> None:
        """Start the process of a service; the lock is held.

        Raises:
            FailedError, UnavailableError: it does not run; the caller decides what becomes of the
            record.
        """
        record, spec = service.record, service.record.spec
        record.state, record.process = "pending", None
        log_path = self._log_path(spec.name)
        new_log = not log_path.exists()
        try:
            self._records.save(record)
            logfile.cap(log_path, self._log_limit_bytes)
            log = logfile.open_log(log_path)
        except OSError as error:
            if is_full(error):
                raise disk_full(self._logs_dir, f"service {spec.name}") from error
            raise FailedError(
                f"service {spec.name} cannot start: its state or log cannot be written: {error}"
                " - check the disk and the rights of the folder"
            ) from error
        try:
            pid, pidfd = self._spawn(spec, log)
        except OSError as error:
            if new_log:
                log_path.unlink(missing_ok=True)
            raise _cannot_start(spec, error) from error
        finally:
            os.close(log)
        service.pidfd = pidfd
        record.process = linux.Identity.of(pid)
        record.state = "running"
        record.started_at = self._clock.now()
        record.reason = restarted_after(record.exit_code) if record.restarts else ""
        self._save_late(record)
        self._exits.add(pidfd, spec.name)
        self._announce(service)

    def _spawn(self, spec: ServiceSpec, log: int) -> tuple[int, int]:
        process = subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=spec.directory,
            env={**os.environ, **spec.environment, linux.MARKER: self._marker(spec.name)},
            start_new_session=True,
            close_fds=True,
        )
        process.returncode = 0  # the pidfd waits from here on: Popen must neither reap it nor warn
        linux.step_aside(process.pid, spec.nice)
        try:
            return process.pid, os.pidfd_open(process.pid)
        except OSError:  # no descriptor left: rather no service than one we cannot see
            linux.signal_group(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            raise

    # ending
    def _ask_to_end(self, service: _Service) -> None:
        record = service.record
        record.stopping = True
        if service.pidfd is None:  # between two attempts
            service.restart_at = None
            record.state, record.reason = "exited", "stopped"
            self._save_late(record)
            self._announce(service)
            return
        self._save_late(record)
        self._signal(service, signal.SIGTERM)

    def _signal(self, service: _Service, number: signal.Signals) -> None:
        """Signal the group of a service, if its leader is alive: else its pid may mean somebody else."""
        process, pidfd = service.record.process, service.pidfd
        if process is not None and pidfd is not None and not linux.wait_for_end(pidfd, 0.0):
            linux.signal_group(process.pid, number)

    def _step(self, ended: Sequence[str]) -> float | None:
        """One turn of the watching thread; returns after how many seconds the next one is due."""
        if not self._may_act():
            # Whoever acts instead may run services of the same names: what we do to ours would hit those.
            time.sleep(_REFUSED_PAUSE_S)
            return _REFUSED_PAUSE_S
        if ended:
            self._finish([ServiceName(name) for name in ended])
        with self._changed:
            now = self._clock.monotonic()
            for service in self._services.values():
                if service.restart_at is not None and service.restart_at <= now:
                    self._restart(service)
            self._cap_logs(now)
        self._deliver()
        with self._changed:
            due = [s.restart_at for s in self._services.values() if s.restart_at is not None]
            if any(service.pidfd is not None for service in self._services.values()):
                due.append(self._logs_checked_at + _LOG_CHECK_S)
        return max(0.0, min(due) - self._clock.monotonic()) if due else None

    def _finish(self, names: Sequence[ServiceName]) -> None:
        """Services ended: kill what they left, learn how they ended, decide what follows."""
        with self._changed:
            services = [self._services[name] for name in names]
        # Before the reaping: as long as the leader is a zombie, its session's number is nobody else's.
        sessions = frozenset(
            process.pid
            for service in services
            if (process := service.record.process) is not None and process.exists()
        )
        markers = {self._marker(name) for name in names}
        self._sweep(markers, sessions)
        with self._changed:
            for service in services:
                record, pidfd = service.record, service.pidfd
                assert pidfd is not None
                assert record.process is not None
                code = linux.exit_code(record.process, pidfd)
                self._exits.drop(pidfd)
                service.pidfd = None
                self._end(service, code)

    def _end(self, service: _Service, code: int | None) -> None:
        record = service.record
        if record.started_at is not None and self._clock.now() - record.started_at >= SETTLED_S:
            record.quick_ends = 0
        verdict = judge(
            record.spec,
            code,
            restarts=record.restarts,
            stopping=record.stopping,
            backoff_s=self._backoff_s,
            quick_ends=record.quick_ends,
        )
        record.quick_ends += 1
        record.state, record.reason = verdict.state, verdict.reason
        record.exit_code, record.process = code, None
        if verdict.restart_in_s is not None:
            service.restart_at = self._clock.monotonic() + verdict.restart_in_s
        self._save_late(record)
        self._announce(service)

    def _restart(self, service: _Service) -> None:
        service.restart_at = None
        if service.record.started_at is not None:
            service.record.restarts += 1
        try:
            self._launch(service)
        except DiskFullError as error:
            _log.warning("%s", error)
            service.record.state, service.record.reason = "pending", str(error)
            service.restart_at = self._clock.monotonic() + _DISK_FULL_PAUSE_S
            self._announce(service)
        except FlopsError as error:
            service.record.state, service.record.reason = "failed", str(error)
            self._save_late(service.record)
            self._announce(service)

    def _sweep(self, markers: set[str], sessions: frozenset[int]) -> None:
        try:
            linux.sweep(markers.__contains__, sessions)
        except TimeoutError as error:
            _log.error("after the end of %s: %s", ", ".join(sorted(markers)), error)

    def _cap_logs(self, now: float) -> None:
        if now < self._logs_checked_at + _LOG_CHECK_S:
            return
        self._logs_checked_at = now
        for name, service in self._services.items():
            if service.pidfd is not None:
                try:
                    logfile.cap(self._log_path(name), self._log_limit_bytes)
                except OSError:
                    _log.exception("the log of service %s was not cut", name)

    def _deliver(self) -> None:
        while True:
            with self._changed:
                if not self._news:
                    return
                status = self._news.popleft()
            self._watchers.deliver(status)

    # adopting
    def _adopt(self) -> None:
        """Take over what an earlier manager left; nothing else touches the records yet."""
        records, broken = self._records.load()
        for path, why in broken:
            _log.error("state file set aside as %s, its processes are killed: %s", path, why)
        for record in records:
            service = self._services[record.spec.name] = _Service(record)
            if record.state == "running" and record.process is not None:
                service.pidfd = record.process.open()
        kept = {self._marker(name) for name, s in self._services.items() if s.pidfd is not None}
        ours = f"@{self._home}"
        try:
            linux.sweep(lambda marker: marker.endswith(ours) and marker not in kept)
        except TimeoutError as error:
            _log.error("while adopting services: %s", error)
        for name, service in self._services.items():
            record = service.record
            if service.pidfd is not None:
                self._exits.add(service.pidfd, name)
                if record.stopping:
                    self._signal(service, signal.SIGKILL)
            elif record.state == "running" or (record.live and record.stopping):
                self._end(service, None)
            elif record.state == "pending":  # its start, or its restart, was about to happen
                service.restart_at = self._clock.monotonic()
        self._news.clear()  # nobody watches yet; `list` tells


def _all_ended(services: Sequence[_Service]) -> bool:
    return not any(service.record.live for service in services)


def _cannot_start(spec: ServiceSpec, error: OSError) -> FailedError | UnavailableError:
    program = spec.command[0]
    if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return UnavailableError(
            f"service {spec.name} cannot start now: {error.strerror} - stop something, or raise the limits"
        )
    if error.errno == errno.ENOENT and spec.directory is not None and not spec.directory.is_dir():
        return FailedError(
            f"service {spec.name} cannot start: its folder {spec.directory} does not exist - make it first"
        )
    reason = error.strerror or str(error)
    return FailedError(
        f"service {spec.name} cannot start '{program}': {reason} - check that it is installed and executable"
    )
