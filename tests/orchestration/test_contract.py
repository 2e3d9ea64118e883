"""What every orchestrator promises; each adapter runs all of it on its own stage."""

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from flops.core.errors import ConflictError, FailedError, InvalidInputError, NotFoundError
from flops.core.ids import ServiceName
from flops.orchestration import Orchestrator, ServiceSpec, ServiceStatus, deploy_in_place
from flops.orchestration.swarm import SwarmOrchestrator
from tests.orchestration.conftest import DEADLINE_S

A, B, C = ServiceName("p-test-agent-1"), ServiceName("p-test-agent-2"), ServiceName("p-test-agent-3")


def status_of(orchestrator: Orchestrator, name: ServiceName) -> ServiceStatus:
    return next(status for status in orchestrator.list() if status.name == name)


def test_deployed_service_runs(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))

    status = history.next()
    assert (status.name, status.state, status.role, status.project) == (A, "running", "agent", "p-test")
    assert status.exit_code is None
    assert status.restarts == 0
    assert status.started_at is not None
    assert (status.pid is not None) == (not isinstance(stage.orchestrator, SwarmOrchestrator))
    assert stage.orchestrator.list() == [status]


def test_same_spec_again_changes_nothing(stage: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    before = stage.orchestrator.list()

    stage.orchestrator.deploy(stage.spec(A))

    assert stage.orchestrator.list() == before


def test_another_spec_under_a_live_name_is_refused(stage: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    before = stage.orchestrator.list()

    with pytest.raises(ConflictError, match=f"service {A} is running with another spec - stop it first"):
        stage.orchestrator.deploy(stage.spec(A, project="p-other"))

    assert stage.orchestrator.list() == before


def test_service_that_cannot_start_fails_at_once_and_leaves_nothing(stage: Any) -> None:
    with pytest.raises(FailedError, match=f"service {A} cannot start '/no/such/program'"):
        stage.orchestrator.deploy(stage.impossible(A))

    assert stage.orchestrator.list() == []


def test_failed_deployment_keeps_what_was_known_of_the_name(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    stage.end(A, 3)
    failed = history.until(A, "failed")

    with pytest.raises(FailedError):
        stage.orchestrator.deploy(stage.impossible(A))

    assert stage.orchestrator.list() == [failed]


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        (0, "exited", ""),
        (3, "failed", "exit code 3"),
        (-9, "failed", "killed by SIGKILL"),
    ],
)
def test_end_of_a_service_is_told(stage: Any, history: Any, code: int, state: str, reason: str) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    stage.end(A, code)

    status = history.until(A, state)
    assert (status.exit_code, status.reason, status.pid) == (code, reason, None)
    assert stage.orchestrator.list() == [status]


def test_ended_service_can_be_deployed_anew(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    stage.end(A, 3)
    history.until(A, "failed")

    stage.orchestrator.deploy(stage.spec(A))

    status = history.until(A, "running")
    assert (status.exit_code, status.reason, status.restarts) == (None, "", 0)


def test_service_is_replaced_by_one_with_another_spec(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    history.until(A, "running")

    deploy_in_place(stage.orchestrator, stage.spec(A, project="p-other"))

    assert [(one.name, one.project, one.live) for one in stage.orchestrator.list()] == [(A, "p-other", True)]
    deploy_in_place(stage.orchestrator, stage.spec(A, project="p-other"))
    assert len(stage.orchestrator.list()) == 1


def test_failing_service_is_restarted_as_often_as_its_spec_says(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A, restart=True))
    history.until(A, "running")

    for attempt in (1, 2):
        stage.end(A, 5)
        pending = history.until(A, "pending")
        assert pending.reason.startswith(f"exit code 5; restart {attempt} of 2 in ")
        running = history.until(A, "running")
        assert (running.restarts, running.reason) == (attempt, "restarted after exit code 5")
        assert running.exit_code == 5
    stage.end(A, 6)

    failed = history.until(A, "failed")
    assert (failed.exit_code, failed.restarts) == (6, 2)
    assert failed.reason == "exit code 6; given up after 2 restarts"


def test_success_and_stop_are_not_restarted(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A, restart=True))
    stage.orchestrator.deploy(stage.spec(B, restart=True))
    stage.end(A, 0)
    assert history.until(A, "exited").restarts == 0

    stage.orchestrator.stop(B)

    assert history.until(B, "exited").reason == "stopped"
    assert [status.state for status in stage.orchestrator.list()] == ["exited", "exited"]


def test_stop_ends_a_service_and_may_be_repeated(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))

    stage.orchestrator.stop(A)
    stage.orchestrator.stop(A)

    status = history.until(A, "exited")
    assert (status.reason, status.exit_code, status.pid) == ("stopped", -15, None)
    assert stage.orchestrator.list() == [status]
    assert history.nothing_more()


def test_stop_many_ends_all_and_refuses_before_it_starts(stage: Any) -> None:
    for name in (A, B, C):
        stage.orchestrator.deploy(stage.spec(name))

    with pytest.raises(NotFoundError):
        stage.orchestrator.stop_many([A, ServiceName("nobody")])
    assert {status.state for status in stage.orchestrator.list()} == {"running"}

    stage.orchestrator.stop_many([A, C])
    assert [status.state for status in stage.orchestrator.list()] == ["exited", "running", "exited"]


def test_stop_many_of_nothing_is_nothing(stage: Any) -> None:
    stage.orchestrator.stop_many([])


def test_removed_service_is_forgotten(stage: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    stage.say(A, "hello")

    stage.orchestrator.remove(A)

    assert stage.orchestrator.list() == []
    with pytest.raises(NotFoundError):
        stage.orchestrator.logs(A)
    stage.orchestrator.deploy(stage.spec(A))
    assert stage.orchestrator.logs(A) == ""


@pytest.mark.parametrize("method", ["stop", "remove", "logs"])
def test_unknown_name_is_said(stage: Any, method: str) -> None:
    with pytest.raises(NotFoundError, match="no service is called 'nobody'"):
        getattr(stage.orchestrator, method)(ServiceName("nobody"))


def test_list_can_be_limited_to_a_project(stage: Any) -> None:
    stage.orchestrator.deploy(stage.spec(B, project="p-one"))
    stage.orchestrator.deploy(stage.spec(A, project="p-one"))
    stage.orchestrator.deploy(stage.spec(C, project="p-two"))

    assert [status.name for status in stage.orchestrator.list()] == [A, B, C]
    assert [status.name for status in stage.orchestrator.list("p-one")] == [A, B]
    assert stage.orchestrator.list("p-none") == []


def test_logs_hold_what_was_printed_and_survive_a_restart(stage: Any, history: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A, restart=True))
    history.until(A, "running")
    stage.say(A, "first\n")
    stage.end(A, 1)
    history.until(A, "running")
    stage.say(A, "second\nthird\n")

    assert stage.orchestrator.logs(A) == "first\nsecond\nthird\n"
    assert stage.orchestrator.logs(A, tail_bytes=10) == "third\n"


def test_closed_subscription_hears_nothing_more(stage: Any, history: Any) -> None:
    heard: list[ServiceStatus] = []
    subscription = stage.orchestrator.watch(heard.append)
    stage.orchestrator.deploy(stage.spec(A))
    history.until(A, "running")
    stage.orchestrator.deploy(stage.spec(B))
    history.until(B, "running")  # the first watcher is told first: the second has heard at least of A by now
    subscription.close()
    subscription.close()
    before = list(heard)
    stage.orchestrator.stop(A)
    history.until(A, "exited")

    stage.orchestrator.stop(B)
    history.until(B, "exited")
    assert A in [status.name for status in before]
    assert all(status.state == "running" for status in heard)


def test_failing_watcher_does_not_harm_the_others(
    stage: Any, history: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(status: ServiceStatus) -> None:
        raise RuntimeError("a bug")

    stage.orchestrator.watch(fail)
    told = threading.Event()
    stage.orchestrator.watch(lambda status: told.set())

    stage.orchestrator.deploy(stage.spec(A))

    assert told.wait(20)
    assert f"a watcher failed at service {A}" in caplog.text
    stage.end(A, 0)
    history.until(A, "exited")


def test_watcher_may_ask_and_deploy(stage: Any, history: Any) -> None:
    def follow(status: ServiceStatus) -> None:
        if status.name == A and status.state == "exited":
            assert status_of(stage.orchestrator, A).state == "exited"
            stage.orchestrator.deploy(stage.spec(B))

    stage.orchestrator.watch(follow)
    stage.orchestrator.deploy(stage.spec(A))
    stage.end(A, 0)

    history.until(B, "running")


def test_nodes_say_where_services_run(stage: Any) -> None:
    nodes = stage.orchestrator.nodes()

    assert nodes
    for node in nodes:
        assert node.name
        assert node.platform in ("linux/amd64", "linux/arm64")
        assert node.cpus >= 1
        assert node.memory_mb > 100
        assert node.ready


def test_image_that_nobody_has_may_be_expected(stage: Any) -> None:
    stage.orchestrator.expect("127.0.0.1:1/nothing:1")

    stage.orchestrator.deploy(stage.spec(A))

    assert status_of(stage.orchestrator, A).live


def test_closing_twice_is_harmless(stage: Any) -> None:
    stage.orchestrator.deploy(stage.spec(A))
    stage.orchestrator.stop(A)
    stage.orchestrator.close()
    stage.orchestrator.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../x"}, "'../x' cannot name a service - use at most 60 of a-z, 0-9 and '-'"),
        ({"name": "a" * 61}, "cannot name a service"),
        ({"command": ()}, "service ok has no command - name a program to run"),
        ({"command": ("a\0b",)}, "service ok has a NUL character"),
        ({"environment": {"A=B": "c"}}, "variable name that is empty or holds '='"),
        ({"max_restarts": -1}, "service ok has max_restarts -1 - use 0 or more"),
    ],
)
def test_spec_that_can_run_nowhere_is_refused(changes: dict[str, Any], message: str) -> None:
    spec: dict[str, Any] = {"name": "ok", "command": ("x",), "role": "agent", "project": "p-test"}

    with pytest.raises(InvalidInputError) as caught:
        ServiceSpec(**(spec | changes))
    assert message in str(caught.value)


def test_what_running_services_use_is_counted(stage: Any, history: Any) -> None:
    assert stage.orchestrator.usage() == []
    spec = stage.spec(A)
    if isinstance(stage.orchestrator, SwarmOrchestrator):  # it can look at the manager's own node only
        spec = replace(spec, node="manager")
    stage.orchestrator.deploy(spec)
    history.until(A, "running")

    (before,) = stage.orchestrator.usage()
    assert before.name == A
    assert before.threads >= 1
    assert before.memory_bytes > 0
    stage.work(A)

    deadline = time.monotonic() + 3 * DEADLINE_S
    while stage.orchestrator.usage()[0].cpu_s < before.cpu_s + 0.05:
        assert time.monotonic() < deadline, "its work was not counted"
        time.sleep(0.05)
    stage.orchestrator.stop(A)
    assert stage.orchestrator.usage() == []
