"""The reconciler: one thread for each project that is not settled, asleep until something happens to it.

Wake-ups come from reports, from ends of services and from requests; every few seconds each project looks by
itself, in case one was missed. A project's thread is the only one that acts on it; whoever wants something
else commits it and wakes the thread, after setting the cancellation where a step must not go on.
"""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from flops.core.disk import DiskFullError, disk_full, is_full
from flops.core.errors import FlopsError, UnavailableError
from flops.core.events import EventKind
from flops.core.ids import ProjectId
from flops.manager.cancellation import Cancellation, Cancelled
from flops.manager.lifecycle import Lifecycle, Surroundings
from flops.manager.states import Observation, State
from flops.manager.store import Superseded
from flops.orchestration import ServiceStatus, Subscription
from flops.persistence import DatabaseAwayError
from flops.telemetry import about

log = logging.getLogger(__name__)

TICK_S = 5.0
SOON_S = 0.5
_RETRIES = 5
AWAY_S = 600.0
"""How long what runs may be out of reach."""
_WAITS = frozenset({State.DEPLOYING, State.TRAINING, State.PACKAGING})


class Reconciler:
    """All projects' threads."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._all = surroundings
        self._lock = threading.Lock()
        self._tasks: dict[ProjectId, _Task] = {}
        self._closed = False
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Go on with every project where it was left."""
        self._subscription = self._all.orchestrator.watch(self._service_changed)
        for project in self._all.store.unsettled():
            self.take(project)

    def take(self, project: ProjectId) -> None:
        """Begin to look after a project."""
        with self._lock:
            if self._closed or project in self._tasks:
                return
            task = self._tasks[project] = _Task(self._all, project, self._settled)
        task.start()

    def wake(self, project: ProjectId, delay_s: float = 0.0) -> None:
        """Something may be new; ``delay_s`` lets several such things be one."""
        with self._lock:
            task = self._tasks.get(project)
        if task is not None:
            task.wake(delay_s)

    def cancel(self, project: ProjectId) -> None:
        """Give up what is being done for the project and look at its state, which was committed before."""
        with self._lock:
            task = self._tasks.get(project)
        if task is not None:
            task.cancellation.cancel()
            task.wake()

    def wait_settled(self, project: ProjectId, timeout_s: float) -> bool:
        """Wait until the project is at rest, and cleaned up where it is at its end; False at the deadline."""
        with self._lock:
            task = self._tasks.get(project)
        return task is None or task.join(timeout_s)

    def wake_all(self, delay_s: float = 0.0) -> None:
        with self._lock:
            tasks = list(self._tasks.values())
        for task in tasks:
            task.wake(delay_s)

    def close(self) -> None:
        """End all threads and the steps they run; projects stay as committed, services run on."""
        with self._lock:
            self._closed = True
            tasks = list(self._tasks.values())
        if self._subscription is not None:
            self._subscription.close()
        for task in tasks:
            task.close()
        for task in tasks:
            task.join(None)

    def _settled(self, project: ProjectId) -> None:
        with self._lock:
            self._tasks.pop(project, None)
            closed = self._closed
        self.wake_all()  # one that waits for its turn may have it now
        # Somebody may have asked for more while its thread was ending: `take` found it still there.
        if not closed and self._is_unsettled(project):
            self.take(project)

    def _is_unsettled(self, project: ProjectId) -> bool:
        try:
            return project in self._all.store.unsettled()
        except (DiskFullError, DatabaseAwayError):
            return True  # who knows; its thread is going to see

    def _service_changed(self, status: ServiceStatus) -> None:
        if not status.live:
            self.wake(ProjectId(status.project))


class _Task:
    """One project's thread."""

    def __init__(
        self, surroundings: Surroundings, project: ProjectId, settled: Callable[[ProjectId], None]
    ) -> None:
        self.cancellation = Cancellation()
        self._all = surroundings
        self._project = project
        self._settled = settled
        self._changed = threading.Condition()
        self._due: float | None = None
        self._closed = False
        self._lifecycle = Lifecycle(surroundings, project, self.cancellation, self.wake)
        self._failures = 0
        self._away_since = 0.0
        self._failed_before: set[State] = set()
        self._thread = threading.Thread(target=self._run, name=project, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self, delay_s: float = 0.0) -> None:
        due = self._all.clock.monotonic() + delay_s
        with self._changed:
            if self._due is None or due < self._due:
                self._due = due
                self._changed.notify()

    def close(self) -> None:
        self._closed = True
        self.cancellation.cancel()
        self.wake()

    def join(self, timeout_s: float | None) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._closed and not self._lifecycle.settled:
                with self._changed:
                    self._due = None
                with about(project=self._project):
                    pause = self._advance()
                if pause and not self._lifecycle.settled:
                    self._sleep(pause)
        finally:
            self._lifecycle.close()
            self._settled(self._project)

    def _advance(self) -> float:
        """One step of the project; answers how long to sleep at most."""
        try:
            try:
                return self._try_to_advance()
            except OSError as error:
                if is_full(error):
                    raise disk_full(self._all.settings.home, f"project {self._project}") from error
                raise
        except (DiskFullError, DatabaseAwayError) as error:
            # Nobody's failure, and there may be no place to note one.
            log.warning("project %s: %s", self._project, error)
            return TICK_S

    def _try_to_advance(self) -> float:
        try:
            more = self._lifecycle.advance()
        except (Superseded, Cancelled):
            return 0.0
        except (DiskFullError, DatabaseAwayError):
            raise
        except UnavailableError as error:
            log.warning("project %s: %s", self._project, error)
            if self._has_patience(error):
                return min(0.2 * 2.0**self._failures, TICK_S)
            return self._fail(str(error))
        except FlopsError as error:
            return self._fail(str(error))
        except Exception as error:
            if is_full(error):
                raise
            log.exception("project %s", self._project)
            return self._fail(
                f"internal error of FLOps: {type(error).__name__}: {error} - see logs/manager.log"
            )
        self._failures = 0
        return 0.0 if more else TICK_S

    def _has_patience(self, error: UnavailableError) -> bool:
        """A few attempts; once a project is beyond its preparation, `AWAY_S`: an engine that is started
        again, or a node that comes back, has lost nothing.
        """
        now = self._all.clock.monotonic()
        self._failures += 1
        if self._failures == 1:
            self._away_since = now
        if self._failures < _RETRIES:
            return True
        if self._all.store.project(self._project).state not in _WAITS:
            return False
        if self._failures == _RETRIES:
            message = f"{error}; the project goes on when that is over, within {AWAY_S / 60:g} minutes"
            with suppress(Superseded):
                self._all.store.add_event(self._project, EventKind.WARNING, {"message": message})
        return now - self._away_since < AWAY_S

    def _fail(self, reason: str) -> float:
        with about(request=self._lifecycle.request):
            log.warning("project %s: %s", self._project, reason)
            state = self._all.store.observe(self._project, Observation(failed=True), reason)
        # Stopping and cleaning up cannot fail, only take another attempt.
        again = state in self._failed_before
        self._failed_before.add(state)
        return TICK_S if again else 0.0

    def _sleep(self, longest_s: float) -> None:
        monotonic = self._all.clock.monotonic
        end = monotonic() + longest_s
        with self._changed:
            while not self._closed:
                due = end if self._due is None else min(self._due, end)
                if (left := due - monotonic()) <= 0:
                    return
                self._changed.wait(left)
