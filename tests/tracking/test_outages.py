import os
import resource
import signal
import socket
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
    Spool,
    recorder_command,
)

if TYPE_CHECKING:
    from tests.tracking.conftest import Home

PROJECT = ProjectId("p-aaaa")
STARTED = RunStarted(time=1.0, experiment="family", name="run", params={"a": "b"})


def metrics(step: int) -> RoundMetrics:
    return RoundMetrics(time=1.0 + step, step=step, metrics={"loss": 1 / step})


def read_until(process: subprocess.Popen[bytes], words: str) -> str:
    """The log line with the words; the recorder writes each new state once."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line.decode():
            return line.decode()
    raise AssertionError(f"the recorder ended without saying '{words}'")


def start_server(home: "Home", port: int) -> subprocess.Popen[bytes]:
    """A tracking server as an operator runs it: it keeps the artifacts and serves them itself."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", home.tracking_uri, "--workers", "1"]
    command += ["--artifacts-destination", str(home.path / "served")]
    with (home.path / "server.log").open("ab") as log:
        # Its own process group: the server is a parent and a child, and a killed parent leaves the child.
        return home.start(command, stdout=log, stderr=log, start_new_session=True)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.slow
def test_a_server_that_comes_late_and_leaves_between_gets_everything(
    home: "Home", tmp_path: Path, contents: Callable[..., dict[str, Any]]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    export = tmp_path / "export"
    export.mkdir()
    (export / "MLmodel").write_text("flavors: {}\n")
    (export / "weights").write_bytes(os.urandom(100_000))
    uri = f"http://somebody:secret@127.0.0.1:{port}"
    command = recorder_command(home.spool.directory, uri, home.artifacts)
    recorder = home.start([*command, "--max-wait-s", "1"], stderr=subprocess.PIPE)
    home.spool.append(PROJECT, STARTED, metrics(1))
    line = read_until(recorder, "takes no records at present")
    assert f"MLflow at http://127.0.0.1:{port} takes no records" in line
    assert "Connection refused" in line
    assert "secret" not in line
    status = home.spool.recorder_status()
    assert status is not None
    assert (status.state, status.pid) == ("waiting", recorder.pid)

    with home.spool.listen_for_results() as ear:
        server = start_server(home, port)
        try:
            home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
            read_until(recorder, "all records are in MLflow")
            stop_server(server)
            home.spool.append(PROJECT, metrics(2))
            read_until(recorder, "takes no records at present")
            home.spool.append(
                PROJECT,
                metrics(3),
                ModelExported(
                    time=9.0,
                    round=3,
                    name="family",
                    directory=str(export),
                    metrics={"loss": 1 / 3},
                ),
                ArtifactExported(time=9.5, round=3, file=str(export / "weights")),
                RunEnded(time=10.0, status="FINISHED"),
            )
            server = start_server(home, port)
            result = home.wait_for(PROJECT, lambda result: result.status is not None, ear=ear)
            assert result.model is not None
            assert result.model.path is None
            downloaded = tmp_path / "downloaded"
            catalog = [sys.executable, "-m", "flops.tracking.catalog", "--tracking-uri", uri]
            download = ["download", "family", "1", str(downloaded)]
            assert home.start([*catalog, *download], stdout=subprocess.DEVNULL).wait() == 0
        finally:
            stop_server(server)
    assert (downloaded / "weights").read_bytes() == (export / "weights").read_bytes()
    assert f"run_id: {result.run_id}" in (downloaded / "MLmodel").read_text()
    assert not home.artifacts.exists()
    written = contents(home.tracking_uri, files=False)  # only the server knows where they are
    (run,) = written["runs"]
    assert [step for step, _, _ in run["metrics"]["loss"]] == [1, 2, 3]
    assert written["models"][0]["metrics"] == [("loss", 3, 4000, 1 / 3)]
    assert [version[:2] for version in written["versions"]] == [("family", 1)]


def test_a_full_disk_of_mlflow_is_waited_for(home: "Home", contents: Callable[..., dict[str, Any]]) -> None:
    command = recorder_command(home.spool.directory, home.tracking_uri, home.artifacts)
    recorder = home.start([*command, "--max-wait-s", "1"], stderr=subprocess.PIPE)
    read_until(recorder, "all records are in MLflow")
    soft, hard = resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (4096, hard))
    with home.spool.listen_for_results() as ear:
        home.spool.append(PROJECT, STARTED, metrics(1))
        assert "takes no records at present" in read_until(recorder, "takes no records at present")
        resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (soft, hard))
        home.wait_for(PROJECT, lambda result: result.offset == home.spool.size_bytes(PROJECT), ear=ear)
    assert contents(home.tracking_uri)["runs"][0]["metrics"]["loss"] == [(1, 2000, 1.0)]


def test_a_store_that_was_replaced_gets_the_project_from_its_first_record(
    home: "Home", prepared_store: Path, contents: Callable[..., dict[str, Any]]
) -> None:
    home.spool.append(PROJECT, STARTED, metrics(1))
    with home.spool.listen_for_results() as ear:
        recorder = home.start_recorder()
        first = home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)
        home.kill(recorder)
        for file in home.path.glob("mlflow.db*"):
            file.unlink()
        (home.path / "mlflow.db").write_bytes(prepared_store.read_bytes())
        home.spool.append(PROJECT, metrics(2))
        home.start_recorder()
        second = home.wait_for(
            PROJECT, lambda result: result.offset == home.spool.size_bytes(PROJECT), ear=ear
        )
    assert second.run_id != first.run_id
    (run,) = contents(home.tracking_uri)["runs"]
    assert (run["name"], run["params"]) == ("run", {"a": "b"})
    assert [step for step, _, _ in run["metrics"]["loss"]] == [1, 2]


def test_one_project_that_cannot_be_shipped_does_not_hold_up_the_others(home: "Home") -> None:
    """A result file that cannot be replaced stands for any trouble of one project alone."""
    other = ProjectId("p-bbbb")
    home.spool.result_file(PROJECT).with_name(f"{PROJECT}.result.json.new").mkdir()
    for project in (PROJECT, other):
        home.spool.append(project, STARTED)
    with home.spool.listen_for_results() as ear:
        home.start_recorder()
        home.wait_for(other, lambda result: result.run_id is not None, ear=ear)
        home.spool.result_file(PROJECT).with_name(f"{PROJECT}.result.json.new").rmdir()
        home.wait_for(PROJECT, lambda result: result.run_id is not None, ear=ear)


@pytest.mark.slow
def test_an_interrupted_first_start_leaves_no_half_made_store(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = recorder_command(spool.directory, uri, tmp_path / "artifacts")
    for words in ("Updating database tables", "all records are in MLflow"):
        recorder = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path)
        try:
            read_until(recorder, words)
        finally:
            recorder.kill()
            recorder.wait()
            assert recorder.stderr is not None
            recorder.stderr.close()
    assert (tmp_path / "mlflow.db").is_file()
    assert not (tmp_path / "mlruns").exists()
