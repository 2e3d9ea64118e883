"""From trained parameters to a registered model: the export's environment, the export, the registration.

The environment is made while training still runs. What goes wrong here never fails a project that was
trained: a warning tells of it, and the bare parameters are kept.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from flops.core.clock import Clock
from flops.core.disk import DiskFullError
from flops.core.errors import FlopsError, InvalidInputError, NotFoundError
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.cancellation import Cancellation, Cancelled
from flops.manager.inference import Inference
from flops.manager.listing import Sight
from flops.manager.paths import ProjectPaths, models_dir
from flops.manager.rows import Model, Project
from flops.manager.states import (
    EXPORT,
    EXPORT_ENVIRONMENT,
    MODEL_IMAGE,
    REGISTER,
    Observation,
    post_training_steps,
)
from flops.manager.step_process import StepRunner
from flops.manager.store import Store, Superseded
from flops.manager.tracker import Tracker
from flops.manager.uploads import upload_path
from flops.persistence import DatabaseAwayError
from flops.telemetry import span
from flops.tracking import Result

log = logging.getLogger(__name__)

REGISTRATION_TIMEOUT_S = 120.0
PARAMETERS = "parameters.safetensors"


class Packaging:
    """One project's packaging; `prepare_environment` and `advance` are called by one thread."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        tracker: Tracker,
        clock: Clock,
        project: ProjectId,
        cancellation: Cancellation,
        step_runner: Callable[[ProjectId], StepRunner],
        inference: Inference,
        step_arguments: Callable[[str, ProjectId], dict[str, Any]],
        wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._tracker = tracker
        self._clock = clock
        self._project = project
        self._cancellation = cancellation
        self._step_runner = step_runner
        self._inference = inference
        self._step_arguments = step_arguments
        self._wake = wake
        self._thread: threading.Thread | None = None
        self._deadline: float | None = None
        self._refused_before = 0

    def prepare_environment(self, request: Mapping[str, Any]) -> None:
        """Begin to make the export's environment, in a thread, where that was not done before."""
        if self._thread is None and EXPORT_ENVIRONMENT not in request["results"]:
            self._thread = threading.Thread(
                target=copy_context().run,  # it is done for the same request
                args=(self._make_environment, dict(request)),
                name=f"{self._project}-packaging",
            )
            self._thread.start()

    def advance(self, project: Project, request: Mapping[str, Any]) -> bool:
        """Do what is next; see `Lifecycle.advance`."""
        results = request["results"]
        if EXPORT_ENVIRONMENT not in results:
            self.prepare_environment(request)
            return False
        if EXPORT not in results:
            self._export(project, request)
            return True
        if REGISTER not in results:
            return self._register(project, results)
        for step in post_training_steps(project.spec.get("post_training_steps") or ()):
            if step not in results:
                self._after_training(step, project, request)
                return True
        self._store.observe(project.id, Observation(packaged=True))
        return True

    def close(self) -> None:
        """Wait for the thread, which the cancellation ends."""
        if self._thread is not None:
            self._thread.join()

    def _make_environment(self, request: dict[str, Any]) -> None:
        try:
            if MODEL_IMAGE in post_training_steps(request["spec"].get("post_training_steps") or ()):
                request["arguments"] = self._step_arguments(MODEL_IMAGE, self._project)
            self._run(EXPORT_ENVIRONMENT, request)
        except (Superseded, Cancelled):
            log.info("project %s: packaging was given up", self._project)
        except (DiskFullError, DatabaseAwayError) as error:
            log.warning("project %s: %s", self._project, error)
            self._thread = None
            return  # the next look of the reconciler is soon enough
        except Exception:
            log.exception("project %s: packaging", self._project)
        self._thread = None
        self._wake()

    def _export(self, project: Project, request: Mapping[str, Any]) -> None:
        arguments = {
            "model_file": str(self._keep_parameters(project)),
            "name": _model_name(project),
            "directory": str(self._folder(project) / "model"),
        }
        failed = request["results"][EXPORT_ENVIRONMENT].get("error")
        if failed is None:
            self._run(EXPORT, {**request, "arguments": arguments})
        else:
            self._store.start_step(project.id, EXPORT)
            self._store.finish_step(project.id, EXPORT, {"error": failed})

    def _after_training(self, step: str, project: Project, request: Mapping[str, Any]) -> None:
        """Make an image of the registered model, or serve it; a failure is the result, and a warning."""
        models = self._store.models(project.id)
        if step == MODEL_IMAGE:
            arguments = {**self._step_arguments(step, self._project), "model": None}
            if models:
                arguments |= {"model": models[0].folder, "name": models[0].name, "version": models[0].version}
            self._run(step, {**request, "arguments": arguments}, "the model's image was not built")
            return
        self._store.start_step(project.id, step)
        try:
            result = self._inference.deploy(project.id, self._cancellation)
        except DatabaseAwayError:
            raise
        except FlopsError as error:
            result = {"error": str(error), "warnings": [f"the model is not served: {error}"]}
        self._store.finish_step(project.id, step, result)

    def _folder(self, project: Project) -> Path:
        return ProjectPaths.of(self._settings, project.id).export(_rounds(project))

    def _keep_parameters(self, project: Project) -> Path:
        """The best model under a name of its own: an extension makes the aggregator's a better one."""
        path = self._folder(project) / PARAMETERS
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.new")
            aside.unlink(missing_ok=True)  # of an attempt that was cut off
            _link(self._trained(project), str(aside))
            aside.replace(path)
        return path

    def _trained(self, project: Project) -> str:
        """The file that the aggregator wrote, or sent where it writes to no disk of this machine."""
        training = project.training or {}
        if (sha256 := training.get("model_sha256")) is not None:
            return str(upload_path(ProjectPaths.of(self._settings, project.id).uploads, str(sha256)))
        return str(training["model_file"])

    def _run(
        self,
        step: str,
        request: Mapping[str, Any],
        consequence: str = "the model is kept as bare parameters, it could not be exported",
    ) -> None:
        """Run one step; its failure is its result, and a warning."""
        self._store.start_step(self._project, step)
        runner = self._step_runner(self._project)
        progress = partial(self._store.add_progress, self._project, step)
        try:
            with span(f"step {step}", project=self._project):
                result = runner.run(step, request, progress, self._cancellation)
        except (DiskFullError, DatabaseAwayError):
            raise
        except FlopsError as error:
            result = {"error": str(error), "warnings": [f"{consequence}: {error}"]}
        finally:
            runner.close()
        self._store.finish_step(self._project, step, result)

    # registration

    def _register(self, project: Project, results: Mapping[str, Mapping[str, Any]]) -> bool:
        """Tell the recorder, and wait for what it makes of it."""
        exported = results[EXPORT].get("directory")
        outcome = self._tracker.result(project.id)
        if self._deadline is None:
            parameters = self._keep_parameters(project)
            self._refused_before = outcome.refused_count if outcome is not None else 0
            self._store.start_step(project.id, REGISTER)
            if exported is None:
                self._tracker.parameters(project, parameters, rounds=_rounds(project))
            else:
                self._tracker.model(
                    project,
                    name=_model_name(project),
                    directory=exported,
                    parameters=str(parameters),
                    rounds=_rounds(project),
                    tags=self._lineage(project, results),
                )
            self._deadline = self._clock.monotonic() + REGISTRATION_TIMEOUT_S
        if outcome is not None and arrived(project, outcome):
            take_over(self._settings, self._store, self._clock, project, outcome)
            self._drop_older_exports(project)
            self._store.finish_step(project.id, REGISTER, {})
            return True
        if outcome is not None and outcome.refused_count > self._refused_before:
            reason = outcome.refused[-1].reason if outcome.refused else "no reason given"
            return self._give_up(f"the model could not be registered: {reason}")
        if self._clock.monotonic() >= self._deadline:
            return self._give_up(
                "the model is not registered yet, MLflow is away - it will be as soon as MLflow is back"
            )
        return False

    def _lineage(self, project: Project, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Tags that say what the version was made from."""
        tags = {
            "flops.project": project.id,
            "flops.commit": results["fetch"]["commit"],
            "flops.lock": results["lock"]["hash"],
        }
        initial = (project.spec.get("model") or {}).get("initial")
        if initial:
            tags["flops.initial"] = initial
        outcome = self._tracker.result(project.id)
        own = outcome.model if outcome is not None and arrived(project, outcome) else None
        earlier = [
            model
            for model in self._store.models(project.id)
            if own is None or (model.name, model.version) != (own.name, own.version)
        ]
        if earlier:
            tags["flops.previous"] = f"{earlier[0].name}/{earlier[0].version}"
        return tags

    def _drop_older_exports(self, project: Project) -> None:
        """The recorder has what an extension left behind: it ships in order."""
        current = self._folder(project)
        for folder in current.parent.iterdir():
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def _give_up(self, warning: str) -> bool:
        self._store.finish_step(self._project, REGISTER, {"warnings": [warning]})
        return True


def arrived(project: Project, outcome: Result) -> bool:
    """Whether the recorder has what the project exported last."""
    kept = (outcome.model, outcome.artifact)
    return any(item is not None and item.rounds == _rounds(project) for item in kept)


def take_over(settings: Settings, store: Store, clock: Clock, project: Project, outcome: Result) -> None:
    """Commit what the recorder says, and see to it that the model outlives the project's folder."""
    if outcome.run_id is not None:
        store.set_tracking(
            project.id,
            {
                "run_id": outcome.run_id,
                "experiment_id": outcome.experiment_id,
                "page": outcome.page,
            },
        )
    model = outcome.model
    if model is None or model.rounds != _rounds(project):
        return
    folder = model.path or _keep(settings, project, model.name, model.version)
    store.add_model(
        Model(
            name=model.name,
            version=model.version,
            project=project.id,
            round=model.round,
            metrics=(project.training or {}).get("metrics") or project.metrics or {},
            created=clock.now(),
            uri=model.uri,
            folder=str(folder) if folder is not None else None,
        )
    )


def parameters_of(store: Store, reference: str, sight: Sight | None = None) -> Path:
    """The bare parameters of a registered model, ``NAME/VERSION``.

    Raises:
        InvalidInputError: there is no such version in sight, or its files are not on this machine.
    """
    name, _, version = reference.rpartition("/")
    try:
        model = store.model(name, int(version), sight)
    except NotFoundError as error:
        raise InvalidInputError(f"model.initial: {error}") from error
    path = Path(model.folder or "/nowhere") / PARAMETERS
    if not path.is_file():
        raise InvalidInputError(
            f"model.initial: the parameters of model {reference} are not on this machine - name another "
            "version, see 'flops models'"
        )
    return path


def _rounds(project: Project) -> int:
    """How many were trained in all: tells the versions of an extended project apart."""
    return int((project.training or {}).get("rounds") or project.rounds_done)


def _model_name(project: Project) -> str:
    return str((project.spec.get("model") or {}).get("name") or project.name)


def _keep(settings: Settings, project: Project, name: str, version: int) -> Path | None:
    """Keep the exported model and its parameters below ``models``, where MLflow's copy is on another
    machine.
    """
    export = ProjectPaths.of(settings, project.id).export(_rounds(project))
    source = export / "model"
    target = models_dir(settings) / name / str(version)
    if target.exists() or not source.exists():
        return target if target.exists() else None
    aside = target.with_name(f".{version}.new")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=_link)
    _link(str(export / PARAMETERS), str(aside / PARAMETERS))
    aside.rename(target)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
