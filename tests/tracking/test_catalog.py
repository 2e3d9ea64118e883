import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.ids import ProjectId
from flops.tracking import ModelExported, RunStarted, tracking_environment
from flops.tracking.commands import artifact_root, shown, without_secrets

if TYPE_CHECKING:
    from tests.tracking.conftest import Home

PROJECT = ProjectId("p-aaaa")


def ask(home: "Home", *arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "flops.tracking.catalog", "--tracking-uri", home.tracking_uri]
    process = home.start([*command, *arguments], stdout=subprocess.PIPE)
    answer = json.loads(process.communicate()[0])
    assert isinstance(answer, dict)
    return process.returncode, answer


@pytest.mark.slow
def test_the_registry_lists_versions_and_gives_their_files(home: "Home", tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "MLmodel").write_text("flavors: {}\n")
    home.spool.append(
        PROJECT,
        RunStarted(time=1.0, experiment="family", name="run"),
        ModelExported(time=2.0, round=4, name="family", directory=str(export), metrics={"loss": 0.5}),
    )
    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        result = home.wait_for(PROJECT, lambda result: result.model is not None, ear=ear)
    status, answer = ask(home, "list")
    (version,) = answer["models"]
    assert status == 0
    assert abs(version.pop("created") - time.time()) < 300
    assert version == {
        "name": "family",
        "version": 1,
        "project": PROJECT,
        "round": 4,
        "metrics": {"loss": 0.5},
        "uri": "models:/family/1",
    }
    copy = tmp_path / "copy"
    assert ask(home, "download", "family", "1", str(copy)) == (0, {"path": str(copy)})
    assert result.model is not None
    assert result.model.path is not None
    stored = Path(result.model.path, "MLmodel").read_text()
    assert (copy / "MLmodel").read_text() == stored

    status, answer = ask(home, "download", "family", "1", str(copy))
    assert (status, answer["error"]["code"]) == (1, "conflict")
    assert answer["error"]["detail"] == f"{copy} exists - name another destination"
    status, answer = ask(home, "download", "family", "2", str(tmp_path / "other"))
    assert (status, answer["error"]["code"]) == (1, "not-found")


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("postgresql://me:secret@db.example/mlflow", "postgresql://db.example/mlflow"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_messages_show_an_address_without_its_secrets(uri: str, text: str) -> None:
    assert shown(uri) == text


def test_foreign_messages_lose_the_passwords_in_them() -> None:
    text = "cannot reach http://me:p:w@h:1/a or postgresql://u@db/x, see a@b.c"
    assert without_secrets(text) == "cannot reach http://h:1/a or postgresql://db/x, see a@b.c"


def test_artifacts_lie_in_a_folder_or_behind_any_address(tmp_path: Path) -> None:
    assert artifact_root(tmp_path / "a b") == f"file://{tmp_path}/a%20b"
    assert artifact_root("s3://bucket/folder") == "s3://bucket/folder"


def test_no_tracking_process_reports_home() -> None:
    environment = tracking_environment()
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == environment["DO_NOT_TRACK"] == "true"
