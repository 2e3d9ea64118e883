import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flops.core.ids import ProjectId
from flops.tracking import Listener, Result, Spool, recorder_command, tracking_environment


@dataclass
class Home:
    """One FLOPS_HOME with a real recorder on a real MLflow store."""

    path: Path
    tracking_uri: str
    spool: Spool
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def artifacts(self) -> Path:
        return self.path / "mlartifacts"

    @property
    def ready_file(self) -> Path:
        return self.path / "ready.json"

    @property
    def log(self) -> str:
        return (self.path / "recorder.log").read_text()

    def start_recorder(self, *options: str) -> subprocess.Popen[bytes]:
        command = recorder_command(self.spool.directory, self.tracking_uri, self.artifacts, self.ready_file)
        with (self.path / "recorder.log").open("ab") as log:
            return self.start([*command, "--max-wait-s", "1", *options], stderr=log)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **tracking_environment(), "FLOPS_HOME": str(self.path)}
        process = subprocess.Popen(command, env=environment, cwd=self.path, **options)
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()

    def wait_for(
        self,
        project: ProjectId,
        condition: Callable[[Result], bool],
        *,
        ear: Listener,
        deadline_s: float = 120.0,
    ) -> Result:
        """The project's result, once it meets the condition; ``ear`` was open before the cause."""
        end = time.monotonic() + deadline_s
        while True:
            result = self.spool.result(project)
            if result is not None and condition(result):
                return result
            left = end - time.monotonic()
            assert left > 0, f"{result}\n{self.spool.recorder_status()}\n{self.log}"
            ear.wait(left)


@pytest.fixture(scope="session")
def prepared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow SQLite file, made once (1.5 s of migrations and 3 s of imports)."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = "import sys, pathlib; from flops.tracking.store import make_sqlite_store as make; "
    subprocess.run(
        [sys.executable, "-c", code + "make(pathlib.Path(sys.argv[1]))", str(file)],
        env={**os.environ, **tracking_environment()},
        cwd=file.parent,
        check=True,
    )
    return file


@pytest.fixture
def home(tmp_path: Path, prepared_store: Path) -> Iterator[Home]:
    shutil.copy(prepared_store, tmp_path / "mlflow.db")
    home = Home(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}", Spool(tmp_path / "spool"))
    yield home
    for process in home.processes:
        home.kill(process)


@pytest.fixture(scope="session")
def mlflow() -> Any:
    """MLflow inside the tests' own process, to look at what the recorder wrote."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates.
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy is deprecated")
        for name, value in tracking_environment().items():
            patch.setenv(name, value)
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store
    return mlflow


@pytest.fixture
def contents(mlflow: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """All that FLOps wrote into a store, without what MLflow chose itself (ids, times of creation)."""
    opened: list[Any] = []

    def read(tracking_uri: str, *, files: bool = True) -> dict[str, Any]:
        client = mlflow.MlflowClient(tracking_uri, registry_uri=tracking_uri)
        opened.append(client)
        experiments = [e for e in client.search_experiments() if e.name != "Default"]
        ids = [experiment.experiment_id for experiment in experiments]
        runs = client.search_runs(ids) if ids else []
        models = client.search_logged_models(ids) if ids else []
        return {
            "experiments": sorted(experiment.name for experiment in experiments),
            "runs": [_run(client, run, files) for run in runs],
            "models": [_model(client, model, files) for model in models],
            "versions": sorted(
                (v.name, v.version, sorted(v.tags.items()), v.source.startswith("models:/m-"))
                for v in client.search_model_versions()
            ),
            "aliases": [(m.name, m.aliases) for m in client.search_registered_models()],
        }

    yield read
    for client in opened:
        client._tracking_client.store.engine.dispose()
        client._get_registry_client().store.engine.dispose()


def _run(client: Any, run: Any, files: bool) -> dict[str, Any]:
    history = {
        key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "start": run.info.start_time,
        "end": run.info.end_time,
        "params": run.data.params,
        "tags": run.data.tags,
        "metrics": {key: sorted(points) for key, points in sorted(history.items())},
        "models": [output.step for output in run.outputs.model_outputs],
        "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)) if files else None,
    }


def _model(client: Any, model: Any, files: bool) -> dict[str, Any]:
    found = client.list_logged_model_artifacts(model.model_id) if files else []
    return {
        "name": model.name,
        "status": str(model.status),
        "tags": {k: v for k, v in model.tags.items() if not k.startswith("mlflow.")},
        "metrics": sorted((m.key, m.step, m.timestamp, m.value) for m in model.metrics or ()),
        "files": sorted(
            # the MLmodel file names its own folder
            (file.path, file.path == "MLmodel" or file.file_size)
            for file in found
        ),
    }
