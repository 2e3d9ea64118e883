"""What learners use, as it is told."""

from flops.core.clock import ManualClock
from flops.core.ids import ServiceName
from flops.node.meter import Meter
from flops.orchestration import FakeOrchestrator, ServiceSpec, ServiceUsage
from tests.node.conftest import NodeStage, wanted

A = ServiceName("p-222222-agent-1")


def test_a_rate_is_made_of_two_looks_that_are_not_too_near() -> None:
    clock = ManualClock()
    orchestrator = FakeOrchestrator(clock=clock)
    orchestrator.deploy(ServiceSpec(A, ("serve",), "agent", "p-222222"))
    meter = Meter(orchestrator, clock)
    orchestrator.use(A, ServiceUsage(A, cpu_s=1.0, memory_bytes=5, threads=2))
    assert meter.look() == {A: {"cpu_percent": None, "memory_bytes": 5, "threads": 2}}
    orchestrator.use(A, ServiceUsage(A, cpu_s=4.0, memory_bytes=6, threads=3))
    clock.advance(0.5)
    assert meter.look()[A]["memory_bytes"] == 5  # the same look
    clock.advance(1.5)
    assert meter.look() == {A: {"cpu_percent": 150.0, "memory_bytes": 6, "threads": 3}}
    orchestrator.use(A, ServiceUsage(A, cpu_s=0.1, memory_bytes=6, threads=3))  # it began anew
    clock.advance(2)
    assert meter.look()[A]["cpu_percent"] is None


def test_what_runs_is_told_with_what_it_uses(stage: NodeStage) -> None:
    assert not stage.learners.any_running()
    stage.learners.want([wanted()])
    assert "usage" not in stage.report()
    stage.wait_for("running")
    assert stage.learners.any_running()
    stage.orchestrator.use(ServiceName(stage.report()["name"]), ServiceUsage(A, memory_bytes=7, threads=1))
    assert set(stage.report()["usage"]) == {
        "cpu_percent",
        "memory_bytes",
        "threads",
        "received_bytes",
        "sent_bytes",
    }
    stage.learners.want([])
    assert not stage.learners.any_running()
