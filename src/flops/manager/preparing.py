"""From a submitted project to one that can be deployed: its steps, one after the other and side by side.

Steps that wait for nothing that is still to be done run at the same time: the first of them in the caller's
thread, each other one in a thread and a step process of its own.
"""

import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial
from typing import Any

from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager import deployment
from flops.manager.cancellation import Cancellation, Cancelled, Places
from flops.manager.packaging import parameters_of
from flops.manager.rows import Project
from flops.manager.states import CLUSTERS, DATA, IMAGES, INITIAL_MODEL, preparing_steps
from flops.manager.step_process import StepRunner
from flops.manager.store import Store, Superseded
from flops.orchestration import Orchestrator
from flops.telemetry import span


def steps_of(project: Project, orchestrator: Orchestrator) -> dict[str, frozenset[str]]:
    """See `preparing_steps`."""
    mock = (project.spec.get("data") or {}).get("mock") is not None
    return preparing_steps(project.spec["training"]["mode"], mock=mock, images=orchestrator.runs_images)


class Preparing:
    """One project's preparation; `advance` and `close` are called by one thread.

    Args:
        orchestrator: will run the project's services.
        places: steps that run at the same time, of all projects.
        support: sees to it that data servers run.
        step_arguments: what a step has to know that no spec says.
        wake: makes somebody call `advance` again.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        project: ProjectId,
        cancellation: Cancellation,
        places: Places,
        step_runner: Callable[[ProjectId], StepRunner],
        support: Callable[[], None],
        step_arguments: Callable[[str, ProjectId], dict[str, Any]],
        orchestrator: Orchestrator,
        wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._project = project
        self._cancellation = cancellation
        self._places = places
        self._step_runner = step_runner
        self._support = support
        self._step_arguments = step_arguments
        self._orchestrator = orchestrator
        self._wake = wake
        self._runner: StepRunner | None = None
        self._branches: dict[str, threading.Thread] = {}
        self._branches_cancellation = Cancellation()
        self._lock = threading.Lock()
        self._failures: list[Exception] = []

    def advance(self, project: Project) -> bool | None:
        """Do what is next; true where there is more to do at once, None where all is done.

        Raises:
            Superseded, Cancelled: somebody asked for something else meanwhile.
            FlopsError: a step failed; others may still run, until `close`.
        """
        with self._lock:
            failure = self._failures.pop() if self._failures else None
            running = set(self._branches)
        if failure is not None:
            raise failure
        # Read after the branches: what ran no more then is among the results.
        results = self._store.steps(self._project)
        steps = steps_of(project, self._orchestrator)
        left = [step for step in steps if step not in results]
        if not left:
            self.close()
            return None
        ready = [step for step in left if step not in running and results.keys() >= steps[step]]
        for step in ready[1:]:
            self._branch(step, results)
        if ready:
            self._runner = self._runner or self._step_runner(self._project)
            self._take(ready[0], results, self._runner, self._cancellation)
        return bool(ready)

    def close(self) -> None:
        """Give up what still runs, and wait for its end."""
        self._branches_cancellation.cancel()
        with self._lock:
            branches = list(self._branches.values())
        for thread in branches:
            thread.join()
        self._failures.clear()
        self._branches_cancellation = Cancellation()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _branch(self, step: str, results: Mapping[str, dict[str, Any]]) -> None:
        thread = threading.Thread(
            target=copy_context().run,  # it is done for the same request
            args=(self._run_branch, step, results, self._branches_cancellation),
            name=f"{self._project}-{step}",
        )
        with self._lock:
            self._branches[step] = thread
        thread.start()

    def _run_branch(
        self, step: str, results: Mapping[str, dict[str, Any]], cancellation: Cancellation
    ) -> None:
        failure: Exception | None = None
        try:
            runner = self._step_runner(self._project)
            with self._cancellation.calling(cancellation.cancel):
                try:
                    self._take(step, results, runner, cancellation)
                finally:
                    runner.close()
        except (Superseded, Cancelled):
            pass
        except Exception as error:  # noqa: BLE001 - raised by `advance`
            failure = error
        with self._lock:
            del self._branches[step]
            if failure is not None:
                self._failures.append(failure)
        self._wake()

    def _take(
        self,
        step: str,
        results: Mapping[str, dict[str, Any]],
        runner: StepRunner,
        cancellation: Cancellation,
    ) -> None:
        """Run one step and commit its result."""
        with self._places.take(cancellation):
            if step in (DATA, CLUSTERS):
                self._support()
            self._store.start_step(self._project, step)
            spec = deployment.read_spec(self._settings, self._project)
            arguments = self._step_arguments(step, self._project)
            if step == INITIAL_MODEL and (initial := spec["model"].get("initial")):
                arguments["parameters"] = str(parameters_of(self._store, initial))
            request = {
                "home": str(self._settings.home),
                "project": self._project,
                "spec": spec,
                "results": results,
                "arguments": arguments,
            }
            progress = partial(self._store.add_progress, self._project, step)
            with span(f"step {step}", project=self._project):
                result = runner.run(step, request, progress, cancellation)
        learners = deployment.learners_of(result["sites"]) if step == DATA else ()
        self._store.finish_step(
            self._project, step, result, learners=learners, clusters=result.get("clusters")
        )
        if step == IMAGES:
            self._orchestrator.expect(result["learner"])
