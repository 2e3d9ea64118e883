"""What is wanted of a node is made so, within what its owner allows."""

import json
from pathlib import Path
from typing import Any

import pytest

from flops.core.consent import Consent
from flops.core.errors import UnavailableError
from flops.core.ids import ServiceName
from flops.federation import AgentConfig
from flops.federation.tally import Tally
from flops.images import Lock
from flops.node.journal import read_journal
from tests.node.conftest import CODE, PROJECT, NodeStage, archive, wanted

NAME = ServiceName(f"{PROJECT}-agent-1")


def _journal(stage: NodeStage) -> list[dict[str, Any]]:
    return read_journal(stage.home.journal_file)


def _config(stage: NodeStage) -> AgentConfig:
    return AgentConfig.read(stage.home.settings.projects_dir / PROJECT / "learner-1" / "config.json")


def test_a_wanted_learner_runs_with_the_nodes_own_paths_and_nothing_else_of_the_managers(
    stage: NodeStage,
) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    config = _config(stage)
    assert config.aggregator == "grpc+tls://127.0.0.1:4567"
    assert (config.token, config.seed) == ("secret-of-the-learner", 7)
    assert (config.isolate, config.insist) == (True, True)
    ours = str(stage.home.folder)
    assert config.log is not None
    assert config.tls is not None
    paths = [config.python, config.code, config.log, config.tally, config.tls.key, config.tls.ca]
    assert all(str(path).startswith(ours) for path in paths), paths
    assert config.data is not None
    assert (config.data.tags, config.data.site) == (("mnist", "ward-7"), "north")
    assert "data.sock" in config.data.location
    assert (Path(config.code) / "data" / "readme").read_bytes() == b"hello"
    assert Path(config.python).exists()
    key = Path(str(config.tls.key))
    assert key.stat().st_mode & 0o777 == 0o600
    (status,) = stage.orchestrator.list(PROJECT)
    assert status.name == NAME


def test_learners_of_one_project_fetch_it_once(stage: NodeStage) -> None:
    stage.learners.want([wanted(1), wanted(2)])
    stage.wait_for("running", 1)
    stage.wait_for("running", 2)
    assert stage.manager.asked.count("code") == 1


def test_what_is_no_longer_wanted_ends_and_leaves_nothing(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    stage.learners.want([])
    assert stage.learners.reports() == []
    assert stage.orchestrator.list() == []
    assert list(stage.home.settings.projects_dir.iterdir()) == []
    assert list(stage.home.records_dir.iterdir()) == []
    (entry,) = _journal(stage)
    assert (entry["state"], entry["reason"]) == ("ended", "it is no longer wanted")


def test_an_ended_learner_is_begun_again_only_as_another_attempt(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    stage.orchestrator.exit(NAME, 1)
    assert stage.wait_for("failed")["exit_code"] == 1
    stage.learners.want([wanted()])
    assert stage.report()["state"] == "failed"
    again = wanted(attempt=2)
    stage.learners.want([again])
    assert stage.wait_for("running")["digest"] == again["digest"]
    assert stage.manager.asked.count("code") == 1
    assert [entry["state"] for entry in _journal(stage)] == ["ended", "began"]


@pytest.mark.parametrize(
    ("consent", "words"),
    [
        (Consent(tags=("other",)), "data tagged mnist, ward-7 are not allowed on this node (allowed: other)"),
        (Consent(owners=("bob",)), "projects of 'ann'"),
        (Consent(repositories=("https://git.example.org/lab/cifar",)), "code of 'https://git.example.org"),
    ],
)
def test_what_the_owner_does_not_allow_is_refused_before_anything_is_fetched(
    stage: NodeStage, consent: Consent, words: str
) -> None:
    stage.consent = consent
    stage.learners.want([wanted()])
    report = stage.report()
    assert report["state"] == "failed"
    assert words in report["reason"]
    assert stage.manager.asked == []
    assert not stage.home.settings.projects_dir.exists()
    (entry,) = _journal(stage)
    assert (entry["state"], entry["project"], entry["owner"]) == ("refused", PROJECT, "ann")
    assert words in entry["reason"]


def test_a_learner_is_given_data_under_allowed_tags_alone(stage: NodeStage) -> None:
    stage.consent = Consent(tags=("mnist",))
    stage.learners.want([wanted()])
    stage.wait_for("running")
    data = _config(stage).data
    assert data is not None
    assert data.tags == ("mnist",)


def test_a_running_learner_ends_when_its_owner_does_not_allow_it_any_more(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    stage.consent = Consent(owners=("bob",))
    stage.learners.reconsider()
    report = stage.report()
    assert report["state"] == "failed"
    assert "not allowed on this node (allowed: bob)" in report["reason"]
    assert stage.orchestrator.list() == []
    stage.restart()
    stage.learners.want([wanted()])
    assert stage.report()["state"] == "failed"


def test_a_killed_node_adopts_what_runs(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    before = stage.wait_for("running")
    stage.restart()
    assert stage.report() == before
    stage.learners.want([wanted()])
    assert stage.manager.asked.count("code") == 1
    assert [entry["state"] for entry in _journal(stage)] == ["began"]


def test_what_ended_while_the_node_was_away_is_in_its_journal(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    stage.learners.close()
    stage.orchestrator.exit(NAME, 0)
    stage.restart()
    assert stage.report()["state"] == "exited"
    (entry,) = _journal(stage)
    assert (entry["state"], entry["reason"]) == ("ended", "the project is over")


def test_a_killed_node_that_was_preparing_goes_on_once_it_is_known_to_be_wanted(stage: NodeStage) -> None:
    stage.manager.errors = [UnavailableError("the manager is away")] * 3
    stage.learners.want([wanted()])
    stage.restart()
    assert stage.report()["state"] == "pending"
    stage.manager.errors = []
    stage.learners.want([wanted()])
    stage.wait_for("running")
    assert [entry["state"] for entry in _journal(stage)] == ["began"]


def test_a_service_of_nobody_is_ended(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    for record in stage.home.records_dir.iterdir():
        record.write_text("{")
    stage.restart()
    assert stage.learners.reports() == []
    assert stage.orchestrator.list() == []


def test_an_absent_manager_is_waited_for(stage: NodeStage) -> None:
    stage.manager.errors = [UnavailableError("the manager is away")]
    stage.learners.want([wanted()])
    stage.wait_for("running")
    assert stage.manager.asked.count("code") == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"code_sha256": "0" * 64}, "the code is not what the manager said it would be"),
        ({"code_bytes": len(CODE) - 1}, "the code is larger than the manager said"),
        ({"code_bytes": len(CODE) + 1}, "the code is not what the manager said it would be"),
        ({"code_bytes": 1 << 40}, "keep data out of the repository"),
        ({"lock": "f" * 32}, "is not lock ffffffffffff"),
        ({"learner": "../../etc"}, "'learner' of an assignment"),
        ({"project": "../x"}, "is not a project id"),
        ({"project": "p-other"}, "is not one of project p-other"),
        ({"tags": []}, "no data tags"),
        ({"owner": 5}, "'owner' of an assignment is no text"),
        ({"config__aggregator": "grpc+tls://evil.example:1"}, "connects to its manager's host alone"),
        ({"config__aggregator": "grpc+unix:///run/docker.sock"}, "connects to its manager's host alone"),
        ({"config__placed": True}, "learners of its own data alone"),
        ({"config__worker_socket": "/x"}, "learners of its own data alone"),
    ],
)
def test_what_cannot_be_is_refused_by_name(stage: NodeStage, changes: dict[str, Any], words: str) -> None:
    stage.learners.want([wanted(**changes)])
    report = stage.wait_for("failed")
    assert words in report["reason"]
    assert stage.orchestrator.list() == []


def test_a_lock_that_says_where_packages_come_from_is_refused(stage: NodeStage) -> None:
    for line in ("--index-url https://evil.example", "x @ https://evil.example/x.whl", "-e git+file:///x"):
        evil = Lock.of("3.11.2", [line])
        stage.manager.locks[PROJECT] = evil.text
        stage.learners.want([wanted(lock=evil.hash)])
        report = stage.wait_for("failed")
        assert "from its own index alone" in report["reason"]


def test_a_lock_for_a_python_that_is_not_here_says_so(stage: NodeStage) -> None:
    lock = Lock.of("3.4.1", [])
    stage.manager.locks[PROJECT] = lock.text
    stage.learners.want([wanted(lock=lock.hash)])
    assert "the project needs Python 3.4, which is not installed" in stage.wait_for("failed")["reason"]


def test_another_patch_of_the_same_python_is_taken_with_a_warning(stage: NodeStage) -> None:
    import sys

    lock = Lock.of(f"3.{sys.version_info.minor}.99", [])
    stage.manager.locks[PROJECT] = lock.text
    stage.learners.want([wanted(lock=lock.hash)])
    assert f"{lock.python} is not installed on this node" in stage.wait_for("running")["reason"]


def test_what_is_no_service_at_all_is_left_out_and_the_rest_runs(stage: NodeStage) -> None:
    stage.learners.want([None, {"name": "../x", "digest": "y"}, {"name": "ok"}, wanted()])
    stage.wait_for("running")
    assert len(stage.learners.reports()) == 1


def test_each_attempt_counts_its_own_rounds_and_bytes(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    tally = Tally(Path(str(_config(stage).tally)))
    tally.trained()
    tally.sent(1000)
    stage.learners.want([wanted(attempt=2)])
    stage.wait_for("running")
    tally.trained()
    tally.sent(500)
    (running,) = stage.learners.running()
    assert (running["rounds"], running["bytes_out"]) == (1, 500)
    stage.learners.want([])
    assert [(entry["rounds"], entry["bytes_out"]) for entry in _journal(stage)] == [(1, 1000), (1, 500)]


def test_a_torn_line_of_the_journal_is_left_out(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    with stage.home.journal_file.open("a") as file:
        file.write('{"event":"ended","entry":')
    (entry,) = _journal(stage)
    assert entry["state"] == "began"
    assert json.loads(stage.home.journal_file.read_text().splitlines()[0])["commit"] == "c" * 40


def test_code_of_another_commit_replaces_what_was_there(stage: NodeStage) -> None:
    stage.learners.want([wanted()])
    stage.wait_for("running")
    other = archive({"model_manager.py": b"x = 2\n"})
    stage.manager.codes[PROJECT] = other
    stage.learners.want([wanted(code=other)])
    stage.wait_for("running")
    assert (Path(_config(stage).code) / "model_manager.py").read_bytes() == b"x = 2\n"
