"""Shipping: applies records to MLflow so that once and many times have the same effect.

MLflow has no transactions over several calls, and the recorder may die after any of them. So every step
looks for its own effect first, under keys that FLOps chose: the run by the tag ``flops.project``; the
model and its version by run, project, round and rounds trained; metrics by MLflow's own rule (same name,
round, time and value are one). Only one recorder works on a spool at a time; a request that reaches MLflow's
server after the recorder that sent it is dead may, in a gap of milliseconds, still be done twice.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from flops.tracking import naming
from flops.tracking.commands import artifact_root, without_secrets
from flops.tracking.model_folder import (
    MLMODEL,
    RecordRefusedError,
    check_model_folder,
    check_plain_file,
    stamped_mlmodel,
)
from flops.tracking.records import (
    ArtifactExported,
    ModelExported,
    Record,
    RoundMetrics,
    RunEnded,
    RunStarted,
)
from flops.tracking.results import KeptArtifact, RegisteredModel, Result

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_METRICS_A_CALL = 1000
_PAIRS_A_CALL = 100
PARAMETERS_FILE = "parameters.safetensors"
_T = TypeVar("_T")


class RunVanishedError(Exception):
    """The run that a result names is in MLflow no longer: the store was replaced."""


class Shipper:
    """Applies the records of any project.

    Args:
        artifacts: where experiments keep their artifacts; None leaves that to MLflow's server.
    """

    def __init__(self, client: "MlflowClient", artifacts: Path | str | None) -> None:
        self._client = client
        self._artifacts = artifact_root(artifacts) if artifacts is not None else None

    def ship(self, records: Sequence[Record], result: Result) -> Result:
        """Apply records that `joinable` put together; returns the result with what they brought.

        Raises:
            RecordRefusedError: MLflow will never take this.
            RunVanishedError: all records have to be shipped again, from the first.
            Exception: anything else that MLflow raises: try again later.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._ship(records, result)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and any(
                self._vanished(run_id) for run_id in (result.run_id, *result.children.values())
            ):
                raise RunVanishedError(result.run_id) from error
            if error.error_code == "INVALID_PARAMETER_VALUE":
                reason = without_secrets(str(error.message))[:1000]
                raise RecordRefusedError(f"MLflow refused it: {reason}") from error
            raise

    def _ship(self, records: Sequence[Record], result: Result) -> Result:
        first = records[0]
        if isinstance(first, RunStarted):
            return self._start(first, result)
        if result.run_id is None:  # the record that begins the run was lost: keep the rest all the same
            experiment = RunStarted(time=first.time, experiment="flops", name=result.project)
            result = self._start(experiment, result)
        if isinstance(first, RoundMetrics):
            metrics = [record for record in records if isinstance(record, RoundMetrics)]
            run_id = result.run_id
            if first.cluster is not None:
                result = self._with_child(first.cluster, first.time, result)
                run_id = result.children[first.cluster]
            self._log_metrics(run_id, _metrics(metrics))
        elif isinstance(first, ModelExported):
            result = replace(result, model=self._register(first, result))
        elif isinstance(first, ArtifactExported):
            result = replace(result, artifact=self._keep(first, result))
        elif isinstance(first, RunEnded):
            self._end(first, result)
            result = replace(result, status=first.status)
        return result

    def _start(self, record: RunStarted, result: Result) -> Result:
        from mlflow.entities import Param, RunTag, ViewType

        experiment_id = result.experiment_id or self._experiment(record.experiment, record.audience)
        run_id = result.run_id
        if run_id is None:
            found = self._client.search_runs(
                [experiment_id],
                f"tags.`{naming.PROJECT_TAG}` = '{result.project}'",
                ViewType.ALL,
                max_results=1,
                order_by=["attributes.start_time ASC"],
            )
            run_id = found[0].info.run_id if found else None
        if run_id is None:
            run = self._client.create_run(
                experiment_id,
                start_time=_milliseconds(record.time),
                tags={naming.PROJECT_TAG: result.project},
                run_name=record.name,
            )
            run_id = run.info.run_id
        if result.status is not None:
            for ended in (run_id, *result.children.values()):
                self._client.update_run(ended, "RUNNING")
        tags = [RunTag(naming.key(name), value) for name, value in record.tags.items()]
        for some in _chunks(tags, _PAIRS_A_CALL):
            self._client.log_batch(run_id, tags=some)
        params = [Param(naming.key(name), value) for name, value in record.params.items()]
        for some in _chunks(params, _PAIRS_A_CALL):
            self._client.log_batch(run_id, params=some)
        return replace(result, experiment_id=experiment_id, run_id=run_id, status=None)

    def _with_child(self, cluster: str, time: float, result: Result) -> Result:
        """The result with the run of a cluster in it, made on first sight."""
        from mlflow.entities import ViewType

        if cluster in result.children:
            return result
        own = f"tags.`{naming.CLUSTER_TAG}` = '{cluster}' and tags.`{naming.PARENT_TAG}` = '{result.run_id}'"
        found = self._client.search_runs([result.experiment_id], own, ViewType.ALL, max_results=1)
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {naming.CLUSTER_TAG: cluster, naming.PARENT_TAG: result.run_id}
            run = self._client.create_run(
                result.experiment_id, start_time=_milliseconds(time), tags=tags, run_name=cluster
            )
            run_id = run.info.run_id
        return replace(result, children={**result.children, cluster: run_id})

    def _experiment(self, wanted: str, audience: str) -> str:
        """The id of the audience's experiment of that name, which is made where there is none."""
        tags = {naming.KIND_TAG: naming.KIND} | ({naming.AUDIENCE_TAG: audience} if audience else {})
        for name in naming.shared_names(wanted, audience):
            name = naming.experiment(name)
            found = self._client.get_experiment_by_name(name)
            if found is None:
                location = None
                if self._artifacts is not None:
                    location = f"{self._artifacts.rstrip('/')}/{naming.folder(name)}"
                make = self._client.create_experiment
                made = _unless_there(partial(make, name, artifact_location=location, tags=tags))
                if made is not None:
                    return str(made)
                found = self._client.get_experiment_by_name(name)
            if not naming.is_of(found.tags.get(naming.AUDIENCE_TAG), audience):
                continue
            if found.lifecycle_stage == "deleted":  # a new project of the family: its name is in use again
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        raise RecordRefusedError(f"experiment '{wanted}' is another's, whatever is added to its name")

    def _log_metrics(self, run_id: str | None, metrics: Iterable["Metric"]) -> None:
        for some in _chunks(metrics, _METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=some)

    def _register(self, record: ModelExported, result: Result) -> RegisteredModel:
        directory = Path(record.directory)
        check_model_folder(directory)
        if record.parameters is not None:
            check_plain_file(Path(record.parameters))
        name = naming.model(record.name)
        tags = {naming.key(tag): value for tag, value in record.tags.items()}
        tags |= {naming.PROJECT_TAG: result.project, naming.ROUND_TAG: str(record.round)}
        if record.rounds:
            tags[naming.ROUNDS_TAG] = str(record.rounds)
        model = self._logged_model(name, tags, result)
        location = str(model.artifact_location)
        if str(model.status) != "READY":
            self._upload(record, model.model_id, location, result)
            self._client.finalize_logged_model(model.model_id, "READY")
        self._link(model.model_id, record.round, result)
        self._log_metrics(result.run_id, self._model_metrics(record, model.model_id, result))
        name = self._registered_model(name, record.audience)
        version = self._version(name, model.model_id, tags, result)
        for alias in record.aliases:
            self._client.set_registered_model_alias(name, alias, str(version))
        return RegisteredModel(
            name=name,
            version=version,
            uri=f"models:/{name}/{version}",
            model_id=model.model_id,
            round=record.round,
            path=local_path(location),
            rounds=record.rounds,
        )

    def _logged_model(self, name: str, tags: dict[str, str], result: Result) -> Any:
        found = self._client.search_logged_models(
            [result.experiment_id], filter_string=f"source_run_id = '{result.run_id}'"
        )
        for model in found:
            if _same(model.tags, tags):
                return model
        return self._client.create_logged_model(
            result.experiment_id, name=name, source_run_id=result.run_id, tags=tags
        )

    def _upload(self, record: ModelExported, model_id: str, location: str, result: Result) -> None:
        directory = Path(record.directory)
        text = stamped_mlmodel(directory, model_id=model_id, run_id=str(result.run_id), location=location)
        self._client.log_model_artifacts(model_id, str(directory))
        with tempfile.TemporaryDirectory() as folder:
            stamped = Path(folder, MLMODEL)
            stamped.write_text(text)
            self._client.log_model_artifact(model_id, str(stamped))
            if record.parameters is not None:
                link = Path(folder, PARAMETERS_FILE)
                link.symlink_to(Path(record.parameters).absolute())
                self._client.log_model_artifact(model_id, str(link))

    def _link(self, model_id: str, step: int, result: Result) -> None:
        """Make the model an output of the run, once: MLflow fails on a second link."""
        from mlflow.entities import LoggedModelOutput

        outputs = self._client.get_run(result.run_id).outputs
        if not any(output.model_id == model_id for output in outputs.model_outputs):
            self._client.log_outputs(result.run_id, [LoggedModelOutput(model_id, step)])

    def _model_metrics(self, record: ModelExported, model_id: str, result: Result) -> Iterator["Metric"]:
        """The model's metrics; MLflow logs them to the run too, where a known figure keeps its time."""
        from mlflow.entities import Metric

        for name, value in record.metrics.items():
            known = [
                metric.timestamp
                for metric in self._client.get_metric_history(result.run_id, naming.key(name))
                if metric.step == record.round and metric.value == value
            ]
            timestamp = known[0] if known else _milliseconds(record.time)
            yield Metric(naming.key(name), value, timestamp, record.round, model_id=model_id)

    def _registered_model(self, wanted: str, audience: str) -> str:
        """The name of the audience's registered model, which is made where there is none."""
        tags = {naming.AUDIENCE_TAG: audience} if audience else {}
        for name in map(naming.model, naming.shared_names(wanted, audience, "{}-{}")):
            _unless_there(partial(self._client.create_registered_model, name, tags=tags))
            found = self._client.get_registered_model(name)
            if naming.is_of(found.tags.get(naming.AUDIENCE_TAG), audience):
                return str(name)
        raise RecordRefusedError(f"model '{wanted}' is another's, whatever is added to its name")

    def _version(self, name: str, model_id: str, tags: dict[str, str], result: Result) -> int:
        for version in self._client.search_model_versions(f"run_id = '{result.run_id}'"):
            if version.name == name and _same(version.tags, tags):
                return int(version.version)
        made = self._client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=result.run_id,
            tags=tags,
            model_id=model_id,
        )
        return int(made.version)

    def _keep(self, record: ArtifactExported, result: Result) -> KeptArtifact:
        file = Path(record.file)
        check_plain_file(file)
        self._client.log_artifact(result.run_id, str(file))
        root = str(self._client.get_run(result.run_id).info.artifact_uri)
        folder = local_path(root)
        return KeptArtifact(
            uri=f"runs:/{result.run_id}/{file.name}",
            round=record.round,
            path=str(Path(folder, file.name)) if folder else None,
            rounds=record.rounds,
        )

    def _end(self, record: RunEnded, result: Result) -> None:
        if record.reason:
            self._client.set_tag(result.run_id, naming.REASON_TAG, record.reason)
        for run_id in (*result.children.values(), result.run_id):
            self._client.set_terminated(run_id, record.status, _milliseconds(record.time))

    def _vanished(self, run_id: str | None) -> bool:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return False
        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")
        return False


def joinable(first: Record, second: Record) -> bool:
    """Whether two neighbours may be shipped in one call: metrics of one run are, which makes catching up
    cheap.
    """
    return (
        isinstance(first, RoundMetrics)
        and isinstance(second, RoundMetrics)
        and first.cluster == second.cluster
    )


def local_path(uri: str) -> str | None:
    """The path behind an artifact's address, None where it is on another machine."""
    parts = urlsplit(uri)
    return unquote(parts.path) if parts.scheme in ("", "file") and not parts.netloc else None


def _metrics(records: Iterable[RoundMetrics]) -> Iterator["Metric"]:
    from mlflow.entities import Metric

    for record in records:
        timestamp = _milliseconds(record.time)
        for name, value in record.metrics.items():
            yield Metric(naming.key(name), value, timestamp, record.step)


def _same(tags: Any, wanted: dict[str, str]) -> bool:
    names = (naming.PROJECT_TAG, naming.ROUND_TAG, naming.ROUNDS_TAG)
    return all(tags.get(name) == wanted.get(name) for name in names)


def _milliseconds(time: float) -> int:
    return round(time * 1000)


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def _unless_there(make: Callable[[], _T]) -> _T | None:
    """Make something; None where MLflow has it already."""
    from mlflow.exceptions import MlflowException

    try:
        return make()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return None
