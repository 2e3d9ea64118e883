"""Who may not act any more does nothing to services that another manager runs under the same names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flops.core.errors import FailedError, UnavailableError
from flops.core.ids import ServiceName
from flops.orchestration import FakeOrchestrator, PermittedOrchestrator, ProcessOrchestrator, ServiceSpec
from tests.orchestration.test_process import OpenProcesses, WaitUntil, only, spec

A, B = ServiceName("p-test-agent-1"), ServiceName("p-test-agent-2")


class Permission:
    """What a lease says; how often it was asked."""

    def __init__(self) -> None:
        self.given = True
        self.asked = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.given

    def check(self) -> None:
        if not self.given:
            raise UnavailableError("another manager acts")


def _spec(name: ServiceName) -> ServiceSpec:
    return ServiceSpec(name=name, command=("sleep", "600"), role="agent", project="p-test")


def test_nothing_is_changed_without_permission_and_everything_is_seen() -> None:
    permission = Permission()
    inner = FakeOrchestrator()
    orchestrator = PermittedOrchestrator(inner, permission.check)
    orchestrator.deploy(_spec(A))
    permission.given = False
    changes: list[Callable[[], None]] = [
        lambda: orchestrator.deploy(_spec(B)),
        lambda: orchestrator.stop(A),
        lambda: orchestrator.stop_many([A]),
        lambda: orchestrator.remove(A),
        lambda: orchestrator.remove_project("p-test"),
    ]
    for change in changes:
        with pytest.raises(UnavailableError, match="another manager acts"):
            change()
    assert [(one.name, one.live) for one in orchestrator.list()] == [(A, True)]
    permission.given = True
    orchestrator.stop(A)
    assert not inner.list()[0].live


def test_a_stop_that_fails_because_permission_has_gone_is_no_failure() -> None:
    permission = Permission()

    class Stuck(FakeOrchestrator):
        def stop_many(self, names: object, grace_s: float = 2.0) -> None:
            permission.given = False
            raise FailedError("it did not end")

    with pytest.raises(UnavailableError, match="another manager acts"):
        PermittedOrchestrator(Stuck(), permission.check).stop_many([A])


def test_the_end_of_a_service_that_another_manager_started_again_is_left_to_that_one(
    tmp_path: Path, open_processes: OpenProcesses, wait_until: WaitUntil
) -> None:
    permission = Permission()
    frozen = ProcessOrchestrator(tmp_path / "state", tmp_path / "logs", backoff_s=0.02, may_act=permission)
    try:
        frozen.deploy(spec("sleep", "600", restart="on-failure"))
        permission.given = False
        successor = open_processes()
        successor.stop(A)
        successor.deploy(spec("sleep", "600", restart="on-failure"))
        running = only(successor)
        asked = permission.asked
        wait_until(lambda: permission.asked >= asked + 3)
        assert only(successor) == running
        assert Path(f"/proc/{running.pid}").exists()
    finally:
        frozen.close()
