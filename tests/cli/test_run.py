import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Flops, StandIn

PROJECT = "p-7k2mqd"
Script = list[tuple[str, dict[str, Any]]]


def spec_sent(stand_in: "StandIn") -> dict[str, Any]:
    method, path, spec = stand_in.requests[-1]
    assert (method, path) == ("POST", "/v1/projects")
    return dict(spec)


# what is asked for


def test_clusters_and_cycles_ask_for_a_hierarchy(stand_in: "StandIn", flops: "Flops") -> None:
    assert flops("run", "git@host:x.git", "--clusters", "3", "--cycles", "5", "--rounds", "2", "-d").code == 0
    training = spec_sent(stand_in)["training"]
    assert (training["mode"], training["cycles"], training["rounds"]) == ("hierarchical", 5, 2)
    assert (training["clusters"]["by"], training["clusters"]["count"]) == ("size", 3)
    assert flops("run", "git@host:x.git", "--cycles", "5", "-d").code == 0
    training = spec_sent(stand_in)["training"]
    assert (training["mode"], training["clusters"]) == ("hierarchical", None)


def test_flags_become_the_spec(stand_in: "StandIn", flops: "Flops") -> None:
    outcome = flops(
        "run", "git@host:x.git@v1", "--mock", "digits", "--learners", "4", "--rounds", "7", "--alpha", "0.2",
        "--strategy", "FedAdam", "--strategy-param", "eta=1e-2", "--strategy-param", "mode=fast",
        "--strategy-param", "flag=true", "-t", "a", "-t", "b c", "--seed", "5", "--name", "n", "--flavor",
        "sklearn", "--fraction-fit", "0.5", "--min-learners", "2", "--cohort", "availability",
        "--over-sample", "1.5", "--deadline", "30", "--initial", "digits:3", "--detach",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert f"flops attach {PROJECT}" in outcome.out
    spec = spec_sent(stand_in)
    assert (spec["repo"], spec["ref"], spec["name"]) == ("git@host:x.git", "v1", "n")
    assert (spec["model"]["flavor"], spec["model"]["initial"]) == ("sklearn", "digits/3")
    training = spec["training"]
    assert (training["learners"], training["rounds"], training["seed"]) == (4, 7, 5)
    assert training["strategy"] == {
        "name": "FedAdam",
        "parameters": {"eta": 0.01, "mode": "fast", "flag": True},
    }
    assert (training["fraction_fit"], training["min_fit_learners"]) == (0.5, 2)
    assert training["min_available_learners"] == 2
    assert (training["cohort"], training["over_sample"]) == ("availability", 1.5)
    assert (training["round_deadline_s"], training["mode"]) == (30.0, "classic")
    assert spec["data"]["tags"] == ["a", "b c"]
    mock = spec["data"]["mock"]
    assert (mock["dataset"], mock["partition"], mock["alpha"], mock["seed"]) == (
        "digits",
        "dirichlet",
        0.2,
        5,
    )


def test_a_folder_is_sent_by_its_absolute_path(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code@2").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, repo, ref in (
        ("code", f"{tmp_path}/code", None),
        ("./code@v1", f"{tmp_path}/code", "v1"),
        ("code@2", f"{tmp_path}/code@2/", None),
        ("code@2@v1", f"{tmp_path}/code@2/", "v1"),
    ):
        assert flops("run", given, "-d").code == 0
        spec = spec_sent(stand_in)
        assert (spec["repo"], spec["ref"]) == (repo, ref)


def test_the_command_line_wins_over_the_spec_file(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path
) -> None:
    file = tmp_path / "spec.yaml"
    (tmp_path / "code").mkdir()
    file.write_text("repo: ./code@v2\ntraining: {rounds: 9, strategy: FedProx}\ndata: {tags: [a]}\n")
    assert flops("run", "--spec", str(file), "--rounds", "4", "-d").code == 0
    spec = spec_sent(stand_in)
    assert (spec["repo"], spec["ref"]) == (f"{tmp_path}/code", "v2")
    assert spec["training"]["rounds"] == 4
    assert spec["training"]["strategy"]["name"] == "FedProx"
    assert flops("run", "https://host/x", "--spec", str(file), "-d").code == 0
    assert (spec_sent(stand_in)["repo"], spec_sent(stand_in)["ref"]) == ("https://host/x", None)


def test_a_thesis_sla_is_taken_as_it_is(stand_in: "StandIn", flops: "Flops", tmp_path: Path) -> None:
    file = tmp_path / "sla.json"
    file.write_text(
        '{"ml_repo_url": "https://host/x", /* few */ "training_configuration": {"training_rounds": 2}}'
    )
    assert flops("run", "-f", str(file), "-d").code == 0
    assert spec_sent(stand_in)["training"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, "name a repository, or a spec with --spec FILE"),
        (["run", "https://host/x", "--alpha", "1"], 2, "--test-split need --mock"),
        (["run", "https://host/x", "--strategy-param", "eta"], 2, "'eta' is not NAME=VALUE"),
        (["run", "https://host/x", "--rounds", "many"], 2, "'many' is not a valid integer"),
        (["run", "/no/such/folder"], 1, "error: there is no folder '/no/such/folder' - name an existing"),
        (["run", "https://host/x", "--rounds", "0"], 1, "training.rounds must be at least 1 (is 0)"),
        (["run", "https://host/x", "--mock", "cifar"], 1, "data.mock.dataset must be 'mnist' or 'digits'"),
        (["run", "--spec", "/no/such/file"], 1, "spec '/no/such/file' cannot be read: No such file"),
        (["run", "https://host/x", "--name", "taken"], 1, "error: project 'taken' runs already - stop it"),
        (["run", "https://host/x", "--name", "broken"], 1, "error: <html>oops</html>"),
        (["show", "../health"], 2, "'../health' is not a project id"),
        (["stop", "p-none22", "x"], 2, "'x' is not a project id"),
        (["show", "p-none22"], 1, "error: there is no project p-none22 - see 'flops ls'"),
    ],
)
def test_errors_are_told_without_a_traceback(
    stand_in: "StandIn", flops: "Flops", arguments: list[str], code: int, message: str
) -> None:
    outcome = flops(*arguments)
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.out


def test_errors_are_json_where_json_was_asked_for(stand_in: "StandIn", flops: "Flops") -> None:
    outcome = flops("run", "https://host/x", "--name", "taken", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.err) == {
        "code": "conflict",
        "detail": "project 'taken' runs already - stop it first",
    }


# what is seen


def test_a_run_is_told_in_plain_lines_where_there_is_no_terminal(
    stand_in: "StandIn", flops: "Flops", finished_script: Script
) -> None:
    stand_in.script = finished_script
    outcome = flops("run", "https://host/x", "--mock", "mnist", "--rounds", "2")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "p-7k2mqd  mnist  https://***@host/mnist",
        "    fetch: commit 1a2b3c",
        "  ✓ fetch                  0.4 s",
        "  ! warning: python 3.10.14 is not here, 3.10.16 is used",
        "  ✓ environment             14 s",
        "    waiting for learners: 1 of 3 connected",
        "  ! round 1: update of learner-3 refused - coef is not finite",
        "      round      loss  accuracy  learners       time",
        "        1/2    0.4012    88.1 %       2/3      1.2 s   94 kB down, 63 kB up",
        "  ! learner learner-3 left - fit_model: ValueError",
        "        2/2    0.3101    89.2 %       2/3      12 ms",
        "  ! round 2: learner-2 left out - too slow",
        "",
        "finished in 23 s: accuracy 89.2 %, loss 0.3101 (best round 2 of 2)",
        "model    mnist:3  models:/mnist/3",
        "next     flops deploy p-7k2mqd    serve the model",
        "         flops model get mnist:3  download the model",
        "         flops ui                 compare runs in the browser",
        "         flops show p-7k2mqd      all about this project",
    ]


def test_json_is_a_line_for_each_event_and_the_project_last(
    stand_in: "StandIn", flops: "Flops", finished_script: Script
) -> None:
    stand_in.script = finished_script
    outcome = flops("run", "https://host/x", "--json")
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [line["seq"] for line in lines[:-1]] == list(range(1, len(finished_script) + 1))
    assert lines[-1]["kind"] == "project"
    assert lines[-1]["state"] == "finished"
    assert outcome.code == 0


def test_a_failed_project_ends_with_its_reason_and_code_1(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.script = [
        ("project.state", {"state": "preparing", "reason": None}),
        ("project.state", {"state": "failed", "reason": "step 'lock': numpy==9 does not exist"}),
    ]
    outcome = flops("run", "https://host/x")
    assert outcome.code == 1
    assert "failed in 1.0 s: step 'lock': numpy==9 does not exist" in outcome.out
    assert "flops logs p-7k2mqd" in outcome.out


def test_attach_tells_an_ended_project_from_its_beginning(
    stand_in: "StandIn", flops: "Flops", finished_script: Script
) -> None:
    stand_in.script = finished_script
    assert flops("run", "https://host/x", "-d").code == 0
    outcome = flops("attach", PROJECT)
    assert outcome.code == 0
    assert "✓ fetch" in outcome.out
    assert "finished in 23 s" in outcome.out


def test_following_goes_on_after_the_manager_was_killed(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.script = [
        ("project.state", {"state": "training", "reason": None}),
        ("warning", {"message": "1"}),
    ]

    def interfere() -> None:
        assert stand_in.streaming.wait(20)
        stand_in.kill()
        stand_in.up()
        stand_in.emit("warning", message="2")
        stand_in.emit("project.state", state="finished", reason=None)

    thread = threading.Thread(target=interfere)
    thread.start()
    outcome = flops("run", "https://host/x", "--json")
    thread.join()
    assert outcome.code == 0, outcome.err
    events = [json.loads(line) for line in outcome.out.splitlines()][:-1]
    assert [event["seq"] for event in events] == [1, 2, 3, 4]
    assert stand_in.stream_starts[0] == 0
    assert stand_in.stream_starts[-1] in (0, 2)  # 0 where the first stream broke before it said a word


# on a terminal


class Terminal:
    """The command on a real pseudo terminal of 80 columns."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self._leader, follower = pty.openpty()
        environment = os.environ | {"FLOPS_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flops.cli", *arguments],
            stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(follower)
        self.seen = ""

    def read_until(self, text: str, deadline_s: float = 30.0) -> str:
        deadline = time.monotonic() + deadline_s
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"'{text}' was not seen in:\n{self.seen}"
            if select.select([self._leader], [], [], left)[0]:
                try:
                    chunk = os.read(self._leader, 65536)
                except OSError:  # EIO: the command ended
                    chunk = b""
                assert chunk, f"'{text}' was not seen before the end of:\n{self.seen}"
                self.seen += chunk.decode(errors="replace")
        return self.seen

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._leader)


def test_ctrl_c_detaches_and_says_how_to_come_back(stand_in: "StandIn", finished_script: Script) -> None:
    stand_in.script = finished_script[:10]
    terminal = Terminal("run", "https://host/x", home=stand_in.settings.home)
    try:
        terminal.read_until("waiting for learners: 0 of 3 connected, at most 2 min 00 s")
        terminal.process.send_signal(signal.SIGINT)
        terminal.read_until("left p-7k2mqd running - come back with 'flops attach p-7k2mqd'")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()
    assert stand_in.projects[PROJECT]["state"] == "training"
    assert not any(request[0] == "DELETE" for request in stand_in.requests)


def test_a_terminal_shows_that_the_manager_is_away(stand_in: "StandIn", finished_script: Script) -> None:
    stand_in.script = finished_script[:13]
    terminal = Terminal("run", "https://host/x", home=stand_in.settings.home)
    try:
        terminal.read_until("round 1: 1 of 3 learners have answered")
        stand_in.kill()
        terminal.read_until("manager is away, waiting")
        stand_in.up()
        terminal.read_until("manager is back")
        stand_in.emit("project.state", state="stopped", reason="a user asked for it")
        terminal.read_until("a user asked for it")
        assert terminal.process.wait(20) == 1
    finally:
        terminal.close()
