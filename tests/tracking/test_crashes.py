import os
import random
import shutil
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
    Record,
    RoundMetrics,
    RunEnded,
    RunStarted,
    Spool,
    tracking_environment,
)

if TYPE_CHECKING:
    from tests.tracking.conftest import Home

PROJECT = ProjectId("p-aaaa")


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """A project's whole life; the model folder needs no real model, MLflow does not look into it."""
    export = tmp_path / "export"
    (export / "data").mkdir(parents=True)
    (export / "MLmodel").write_text("flavors: {}\nmlflow_version: 2.12.1\n")
    (export / "data" / "weights").write_bytes(os.urandom(10_000))
    parameters = tmp_path / "parameters.safetensors"
    parameters.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return [
        RunStarted(time=1.0, experiment="family", name="run", tags={"a": "b"}, params={"c": "d"}),
        *(RoundMetrics(time=1.5 + r, step=r, metrics={"loss": 1 / r}) for r in range(1, 4)),
        ModelExported(
            time=5.0,
            round=3,
            name="family",
            directory=str(export),
            metrics={"loss": 1 / 3, "accuracy": 0.5},
            parameters=str(parameters),
            aliases=("best",),
        ),
        ArtifactExported(time=5.5, round=3, file=str(parameters)),
        RunEnded(time=6.0, status="FINISHED", reason="done"),
    ]


@pytest.mark.slow
def test_a_kill_after_any_call_to_mlflow_changes_nothing(
    tmp_path: Path,
    prepared_store: Path,
    records: list[Record],
    contents: Callable[..., dict[str, Any]],
) -> None:
    template, folder = tmp_path / "template", tmp_path / "homes"
    template.mkdir()
    folder.mkdir()
    shutil.copy(prepared_store, template / "mlflow.db")
    Spool(template / "spool").append(PROJECT, *records)
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dying_recorder.py")), template, folder],
        env={**os.environ, **tracking_environment()},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    calls = int(ran.stdout.split()[-1])
    assert calls > 20
    reference = contents(f"sqlite:///{folder / 'reference' / 'mlflow.db'}")
    assert len(reference["runs"]) == len(reference["models"]) == len(reference["versions"]) == 1
    assert [path for path, _ in reference["models"][0]["files"]] == [
        "MLmodel",
        "data",
        "parameters.safetensors",
    ]
    for number in range(1, calls + 1):
        after = contents(f"sqlite:///{folder / str(number) / 'mlflow.db'}")
        assert after == reference, f"killed after call {number} of {calls}"
        result = Spool(folder / str(number) / "spool").result(PROJECT)
        assert result is not None
        assert (result.status, result.refused) == ("FINISHED", ())
        assert result.model is not None
        assert result.model.path is not None
        weights = Path(result.model.path, "data", "weights")
        assert weights.read_bytes() == (tmp_path / "export" / "data" / "weights").read_bytes()


@pytest.mark.slow
def test_a_recorder_that_is_killed_again_and_again_ships_everything_once(
    home: "Home", records: list[Record], contents: Callable[..., dict[str, Any]]
) -> None:
    chance = random.Random(7)
    started, *rest = records
    projects = [ProjectId(f"p-aaa{number}") for number in range(4)]
    with home.spool.listen_for_results() as ear:
        for number, project in enumerate(projects):
            home.spool.append(project, started)
            recorder = home.start_recorder()
            for record in rest:
                home.spool.append(project, record)
            if number < len(projects) - 1:
                # Die somewhere between the first sign of work and the end of it.
                home.wait_for(project, lambda result: result.run_id is not None, ear=ear)
                ear.wait(chance.uniform(0, 0.05))
                home.kill(recorder)
        for project in projects:
            home.wait_for(project, lambda result: result.status is not None, ear=ear)
    written = contents(home.tracking_uri)
    assert len(written["runs"]) == len(written["models"]) == len(projects)
    assert [version[1] for version in written["versions"]] == [1, 2, 3, 4]
    first = written["runs"][0]
    for run in written["runs"]:
        assert run["metrics"] == first["metrics"]
        assert (run["status"], run["models"], run["artifacts"]) == (
            "FINISHED",
            [3],
            ["parameters.safetensors"],
        )
