from dataclasses import replace

from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.manager.rows import Service
from flops.manager.supervision import MAX_RESTARTS, MAX_RESTARTS_OF_KILLED, Action, Verdict, judge
from flops.orchestration import ServiceState, ServiceStatus

PROJECT = ProjectId("p-7k2mqd")
AGGREGATOR = Service(ServiceName("p-7k2mqd-aggregator"), "aggregator", None)
ONE = Service(ServiceName("p-7k2mqd-agent-1"), "agent", LearnerId("learner-1"))
TWO = Service(ServiceName("p-7k2mqd-agent-2"), "agent", LearnerId("learner-2"))


def status(service: Service, state: ServiceState, code: int | None = None) -> ServiceStatus:
    reason = "" if code is None else f"exit code {code}"
    return ServiceStatus(service.name, state, code, reason, 0, 1.0, None, service.role, PROJECT)


def judged(services: list[Service], *statuses: ServiceStatus) -> list[Action]:
    found = {item.name: item for item in statuses}
    return list(judge(PROJECT, services, found, lambda name: "the last line"))


def test_nothing_is_done_while_everything_runs() -> None:
    services = [AGGREGATOR, ONE]
    assert judged(services, status(AGGREGATOR, "running"), status(ONE, "running")) == []


def test_an_aggregator_that_ended_is_restarted_three_times_and_then_fails_the_project() -> None:
    (action,) = judged([AGGREGATOR], status(AGGREGATOR, "failed", 1))
    assert (action.verdict, action.reason) == (
        Verdict.RESTART,
        "the aggregator ended (exit code 1): the last line - restart 1 of 3 without progress",
    )
    tired = Service(AGGREGATOR.name, "aggregator", None, restarts=3)
    (action,) = judged([tired], status(tired, "failed", 1))
    assert action.verdict is Verdict.FAIL
    assert action.reason == (
        "the aggregator ended (exit code 1): the last line; given up after 3 restarts without progress"
        " - see 'flops logs p-7k2mqd'"
    )


def test_what_is_killed_has_more_chances_than_what_ends_by_itself_and_each_comes_later() -> None:
    pauses = []
    for restarts in range(MAX_RESTARTS_OF_KILLED):
        tired = Service(AGGREGATOR.name, "aggregator", None, restarts=restarts)
        (action,) = judged([tired], status(tired, "failed", -9))
        assert action.verdict is Verdict.RESTART
        pauses.append(action.pause_s)
    assert pauses[:5] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 30.0
    tired = Service(AGGREGATOR.name, "aggregator", None, restarts=MAX_RESTARTS_OF_KILLED)
    (action,) = judged([tired], status(tired, "failed", -9))
    assert action.verdict is Verdict.FAIL


def test_a_service_without_space_on_its_disk_is_started_again_for_as_long_as_it_takes() -> None:
    tired = Service(AGGREGATOR.name, "aggregator", None, restarts=3)
    (action,) = judged([tired], status(tired, "failed", 75))
    assert action.verdict is Verdict.WAIT
    assert action.pause_s > 1.0


def test_a_service_that_vanished_is_started_again() -> None:
    actions = judged([AGGREGATOR, ONE], status(AGGREGATOR, "lost"), status(ONE, "failed", -9))
    assert [action.verdict for action in actions] == [Verdict.RESTART, Verdict.RESTART]


def test_an_agent_that_ended_by_itself_is_not_started_again() -> None:
    actions = judged(
        [AGGREGATOR, ONE, TWO],
        status(AGGREGATOR, "running"),
        status(ONE, "failed", 1),
        status(TWO, "running"),
    )
    assert [(action.service, action.verdict) for action in actions] == [(ONE, Verdict.OVER)]


def test_a_project_without_learners_fails_at_once() -> None:
    gone = Service(ONE.name, "agent", ONE.learner, over="learner-1 ended (exit code 1)")
    actions = judged(
        [AGGREGATOR, gone, TWO],
        status(AGGREGATOR, "running"),
        status(gone, "failed", 1),
        status(TWO, "failed", 1),
    )
    assert [action.verdict for action in actions] == [Verdict.OVER, Verdict.FAIL]
    assert actions[-1].reason == (
        "no learner is left of 2: learner-2 ended (exit code 1): the last line - see 'flops logs p-7k2mqd'"
    )


def test_agents_that_were_told_that_training_is_over_are_no_news() -> None:
    assert judged([AGGREGATOR, ONE], status(AGGREGATOR, "running"), status(ONE, "exited", 0)) == []


ASIA = Service(ServiceName("p-7k2mqd-aggregator-1"), "aggregator", None, cluster="asia")
EUROPE = Service(ServiceName("p-7k2mqd-aggregator-2"), "aggregator", None, cluster="europe")


def test_the_aggregator_of_a_cluster_is_restarted_and_then_done_without() -> None:
    fine = [status(AGGREGATOR, "running"), status(EUROPE, "running"), status(ONE, "running")]
    (action,) = judged([AGGREGATOR, ASIA, EUROPE, ONE], *fine, status(ASIA, "failed", 1))
    assert action.verdict is Verdict.RESTART
    assert action.reason.startswith("the aggregator of cluster asia ended (exit code 1): the last line")
    tired = replace(ASIA, restarts=MAX_RESTARTS)
    (action,) = judged([AGGREGATOR, tired, EUROPE, ONE], *fine, status(tired, "failed", 1))
    assert (action.service, action.verdict) == (tired, Verdict.OVER)


def test_a_project_without_clusters_fails() -> None:
    over = replace(ASIA, over="the aggregator of cluster asia ended (exit code 2)")
    tired = replace(EUROPE, restarts=MAX_RESTARTS)
    actions = judged(
        [AGGREGATOR, over, tired, ONE],
        status(AGGREGATOR, "running"),
        status(over, "failed", 2),
        status(tired, "failed", 1),
        status(ONE, "running"),
    )
    assert [action.verdict for action in actions] == [Verdict.OVER, Verdict.FAIL]
    assert actions[-1].reason.startswith("no cluster is left of 2: the aggregator of cluster europe ended")


def test_clusters_that_ended_because_training_is_over_are_no_news() -> None:
    assert judged([AGGREGATOR, ASIA], status(AGGREGATOR, "running"), status(ASIA, "exited", 0)) == []


def test_an_agent_that_lost_its_worker_for_lack_of_memory_says_so() -> None:
    worker = Service(ServiceName("p-7k2mqd-worker-1"), "worker", LearnerId("learner-1"))
    killed = replace(status(worker, "failed", -9), reason="killed by its memory limit (30 MB)")
    actions = judged(
        [AGGREGATOR, ONE, worker], status(AGGREGATOR, "running"), status(ONE, "failed", 1), killed
    )
    assert actions[0].verdict is Verdict.OVER
    assert actions[0].reason.endswith(" - its worker was killed by its memory limit (30 MB)")
    assert actions[1].verdict is Verdict.RESTART
    assert actions[1].reason.startswith("the worker of learner-1 ended (killed by its memory limit (30 MB))")


def test_a_learner_whose_node_is_gone_is_over_at_once_and_others_go_on() -> None:
    gone = replace(status(ONE, "lost"), final=True, reason="node clinic is gone: it has left")
    (action,) = judged([AGGREGATOR, ONE, TWO], status(AGGREGATOR, "running"), gone, status(TWO, "running"))
    assert (action.verdict, action.service) == (Verdict.OVER, ONE)
    assert action.reason == "learner-1 is over (node clinic is gone: it has left)"


def test_a_project_without_any_learner_left_says_which_node_was_the_last() -> None:
    refused = replace(status(ONE, "failed"), final=True, reason="projects of 'ann' are not allowed")
    over, failed = judged([AGGREGATOR, ONE], status(AGGREGATOR, "running"), refused)
    assert (over.verdict, failed.verdict) == (Verdict.OVER, Verdict.FAIL)
    assert "projects of 'ann' are not allowed" in failed.reason
