import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.ids import ProjectId
from flops.tracking import (
    ArtifactExported,
    ModelExported,
    RoundMetrics,
    RunEnded,
    RunStarted,
    tracking_environment,
)

if TYPE_CHECKING:
    from tests.tracking.conftest import Home

Contents = Callable[..., dict[str, Any]]
PROJECT = ProjectId("p-aaaa")
STARTED = RunStarted(
    time=1000.0,
    experiment="digits",
    name="first try",
    tags={"flops.commit": "abc"},
    params={"training.rounds": "3"},
)


def metrics(step: int) -> RoundMetrics:
    return RoundMetrics(time=1000.5 + step, step=step, metrics={"loss": 1 / step, "learner 1/loss%": 2.0})


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scikit-learn model as a user's environment exports it, by a process of its own."""
    folder = tmp_path_factory.mktemp("exported")
    code = """if True:
        import sys
        import mlflow.sklearn
        import numpy as np
        from mlflow.models import infer_signature
        from sklearn.linear_model import LogisticRegression
        x = np.array([[0.0], [1.0], [2.0], [3.0]])
        model = LogisticRegression().fit(x, [0, 0, 1, 1])
        mlflow.sklearn.save_model(
            model, sys.argv[1], signature=infer_signature(x, model.predict(x)), input_example=x[:2],
            pip_requirements=["scikit-learn"], serialization_format="cloudpickle",
        )
    """
    subprocess.run(
        [sys.executable, "-c", code, str(folder / "model")],
        env={**os.environ, **tracking_environment()},
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "parameters.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return folder / "model"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
def test_a_project_becomes_a_run_and_a_version_that_can_be_loaded(
    home: "Home", exported: Path, contents: Contents, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelExported(
        time=1004.0,
        round=3,
        name="digits/logistic",
        directory=str(exported),
        metrics={"loss": 1 / 3, "accuracy": 0.9},
        tags={"flops.commit": "abc"},
        parameters=str(exported.parent / "parameters.safetensors"),
        aliases=("best",),
    )
    with home.spool.listen_for_results() as ear:
        recorder = home.start_recorder()
        home.spool.append(PROJECT, STARTED, metrics(1))
        result = home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
        assert result.page == f"#/experiments/{result.experiment_id}/runs/{result.run_id}"
        home.spool.append(PROJECT, metrics(2), metrics(3), model)
        home.spool.append(PROJECT, RunEnded(time=1005.0, status="FINISHED", reason="all rounds"))
        result = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
    recorder.terminate()
    assert recorder.wait() == 0
    assert (result.status, result.refused, result.offset) == (
        "FINISHED",
        (),
        home.spool.size_bytes(PROJECT),
    )
    assert result.model is not None
    assert result.model.uri == "models:/digits-logistic/1"
    assert result.model.path is not None
    assert Path(result.model.path).is_relative_to(home.artifacts)
    assert Path(result.model.path, "parameters.safetensors").is_file()

    written = contents(home.tracking_uri)
    assert written["experiments"] == ["digits"]
    (run,) = written["runs"]
    assert (run["name"], run["status"], run["start"], run["end"]) == (
        "first try",
        "FINISHED",
        1_000_000,
        1_005_000,
    )
    assert run["params"] == {"training.rounds": "3"}
    assert (
        run["tags"].items()
        >= {
            "flops.project": PROJECT,
            "flops.commit": "abc",
            "flops.reason": "all rounds",
        }.items()
    )
    assert run["metrics"]["loss"] == [
        (1, 1_001_500, 1.0),
        (2, 1_002_500, 0.5),
        (3, 1_003_500, 1 / 3),
    ]
    assert [step for step, _, _ in run["metrics"]["learner 1/loss_"]] == [1, 2, 3]
    assert run["models"] == [3]
    (logged,) = written["models"]
    assert logged["metrics"] == [("accuracy", 3, 1_004_000, 0.9), ("loss", 3, 1_003_500, 1 / 3)]
    assert written["aliases"] == [("digits-logistic", {"best": 1})]

    # The recorder's own work is checked through MLflow's public way of loading a registered model.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", home.tracking_uri)
    loaded = mlflow.pyfunc.load_model(result.model.uri)
    assert loaded.metadata.run_id == result.run_id
    assert loaded.metadata.signature is not None
    import numpy as np

    assert loaded.predict(np.array([[0.0], [3.0]])).tolist() == [0, 1]


@pytest.mark.slow
def test_a_run_that_had_ended_goes_on_and_gets_a_version_of_its_own(
    home: "Home", exported: Path, contents: Contents
) -> None:
    def model(rounds: int) -> ModelExported:
        return ModelExported(time=1004.0, round=2, rounds=rounds, name="digits", directory=str(exported))

    def status() -> str:
        return str(contents(home.tracking_uri)["runs"][0]["status"])

    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        home.spool.append(PROJECT, STARTED, metrics(2), model(2), RunEnded(time=1005.0, status="FINISHED"))
        first = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
        home.spool.append(PROJECT, STARTED, metrics(3))
        home.wait_for(PROJECT, lambda result: result.status is None, ear=ear)
        assert status() == "RUNNING"
        home.spool.append(PROJECT, model(3), model(3), RunEnded(time=1009.0, status="FINISHED"))
        second = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
    assert first.model is not None
    assert second.model is not None
    assert (first.model.version, first.model.rounds) == (1, 2)
    assert (second.model.version, second.model.rounds, second.model.round) == (2, 3, 2)
    assert first.run_id == second.run_id
    written = contents(home.tracking_uri)
    (run,) = written["runs"]
    assert (run["status"], run["end"]) == ("FINISHED", 1_009_000)
    assert [step for step, _, _ in run["metrics"]["loss"]] == [2, 3]
    assert len(written["models"]) == 2


def test_clusters_have_runs_of_their_own_below_that_of_the_project(home: "Home", contents: Contents) -> None:
    def of(cluster: str, step: int) -> RoundMetrics:
        return RoundMetrics(time=1000.5 + step, step=step, metrics={"loss": 1 / step}, cluster=cluster)

    inner = [of("europe/north", 1), of("asia", 1), of("asia", 2), of("europe/north", 2)]
    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        home.spool.append(PROJECT, STARTED, *inner, metrics(1), RunEnded(time=1005.0, status="FINISHED"))
        result = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
        # The whole spool again, as after the loss of the result: nothing is made twice.
        home.spool.append(PROJECT, STARTED, *inner, RunEnded(time=1005.0, status="FINISHED"))
        end = home.spool.size_bytes(PROJECT)
        again = home.wait_for(PROJECT, lambda result: result.offset == end, ear=ear)
    assert again.children == result.children
    assert set(result.children) == {"europe/north", "asia"}
    runs = {run["name"]: run for run in contents(home.tracking_uri)["runs"]}
    assert set(runs) == {"first try", "europe/north", "asia"}
    assert {run["status"] for run in runs.values()} == {"FINISHED"}
    for name in ("europe/north", "asia"):
        assert runs[name]["tags"]["mlflow.parentRunId"] == result.run_id
        assert runs[name]["tags"]["flops.cluster"] == name
        assert [step for step, _, _ in runs[name]["metrics"]["loss"]] == [1, 2]
    assert [step for step, _, _ in runs["first try"]["metrics"]["loss"]] == [1]


def test_what_cannot_be_tracked_is_refused_and_the_rest_goes_on(
    home: "Home", contents: Contents, tmp_path: Path
) -> None:
    secret = tmp_path / "token"
    secret.write_text("secret")
    foreign = tmp_path / "export"
    foreign.mkdir()
    (foreign / "MLmodel").write_text("flavors: {}\n")
    (foreign / "weights").symlink_to(secret)
    parameters = tmp_path / "parameters.safetensors"
    parameters.write_bytes(b"\2\0\0\0\0\0\0\0{}")

    spool = home.spool
    spool.append(PROJECT, STARTED)
    with (spool.directory / f"{PROJECT}.jsonl").open("ab") as file:
        file.write(b"no JSON at all\n")
    spool.append(
        PROJECT,
        metrics(1),
        metrics(2),
        ModelExported(time=2.0, round=2, name="x", directory=str(foreign)),
        ModelExported(time=2.0, round=2, name="x", directory=str(tmp_path / "gone")),
        RunStarted(time=3.0, experiment="digits", name="again", params={"training.rounds": "4"}),
        ArtifactExported(time=4.0, round=2, file=str(parameters)),
        RunEnded(time=5.0, status="FAILED", reason="no model could be exported"),
    )
    with spool.listen_for_results() as ear:
        home.start_recorder()
        result = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
    reasons = [refusal.reason for refusal in result.refused]
    expected = [
        "a line is no tracking record",
        f"{foreign}/weights is not a plain file - save the model without links",
        f"{tmp_path}/gone/MLmodel is gone - export the model again",
        "MLflow refused it",
    ]
    assert result.refused_count == len(reasons) == len(expected), reasons
    for reason, begin in zip(reasons, expected, strict=True):
        assert reason.startswith(begin)
    assert result.model is None
    assert result.artifact is not None
    assert result.artifact.path is not None
    assert Path(result.artifact.path).read_bytes() == parameters.read_bytes()
    written = contents(home.tracking_uri)
    assert [step for step, _, _ in written["runs"][0]["metrics"]["loss"]] == [1, 2]
    assert written["runs"][0]["artifacts"] == ["parameters.safetensors"]
    assert written["versions"] == []
    assert not any(path.name == "weights" for path in home.artifacts.rglob("*"))


def test_records_without_a_beginning_are_kept_in_a_run_of_their_own(home: "Home", contents: Contents) -> None:
    home.spool.append(PROJECT, metrics(1))
    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
    (run,) = contents(home.tracking_uri)["runs"]
    assert (run["name"], run["tags"]["flops.project"]) == (PROJECT, PROJECT)


def test_a_project_of_a_deleted_family_brings_it_back(home: "Home", contents: Contents, mlflow: Any) -> None:
    client = mlflow.MlflowClient(home.tracking_uri)
    client.delete_experiment(client.create_experiment("digits"))
    home.spool.append(PROJECT, STARTED)
    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
    assert contents(home.tracking_uri)["experiments"] == ["digits"]


@pytest.mark.slow
def test_only_one_recorder_works_on_a_spool(home: "Home") -> None:
    with home.spool.listen_for_results() as ear:
        first = home.start_recorder()
        home.spool.append(PROJECT, STARTED)
        home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
        second = home.start_recorder()
        assert second.wait(60) == 1
    assert f"another recorder works on {home.spool.directory} - stop it first" in home.log
    assert first.poll() is None
    assert json.loads(home.ready_file.read_text())["pid"] == first.pid
    status = home.spool.recorder_status()
    assert status is not None
    assert (status.state, status.pid) == ("ready", first.pid)
