"""Virtual learners take part as learners with processes of their own would."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.virtual.conftest import Train, Training

NAMES = [f"learner-{number}" for number in range(1, 5)]


def workers_of(training: Training) -> list[psutil.Process]:
    return psutil.Process(training.agents["agents"].pid).children()


def kill_a_worker(training: Training) -> None:
    os.kill(workers_of(training)[0].pid, signal.SIGKILL)


def test_the_result_is_that_of_as_many_processes_to_the_bit(train: Train) -> None:
    processes, virtual = train(virtual=False), train(workers=2)
    bits = processes.result()
    assert virtual.result() == bits
    assert virtual.measured("loss") == processes.measured("loss")
    assert train(workers=3).result() == bits
    assert [agent.wait(10) for agent in [*processes.agents.values(), *virtual.agents.values()]] == [0] * 5


def test_learners_are_pinned_to_a_few_processes_and_keep_their_own_state_and_shards(train: Train) -> None:
    training = train(workers=2)
    training.result()
    assert training.measured("fits") == [dict.fromkeys(NAMES, number) for number in (1, 2, 3)]
    pids = training.measured("pid")
    assert pids[0] == pids[1] == pids[2]
    assert pids[0]["learner-1"] == pids[0]["learner-3"] != pids[0]["learner-2"] == pids[0]["learner-4"]
    shards = training.measured("shard")
    assert shards[0] == shards[1] == shards[2]
    assert len(set(shards[0].values())) == 4


def test_an_error_of_one_learners_code_ends_its_part_alone(train: Train) -> None:
    few = {"min_available_learners": 3, "min_fit_learners": 3, "min_evaluate_learners": 3}
    fault = "if self.fits == 2 and len(self.y) == 60: raise ValueError('bad batch')"  # learner 2
    training = train(fault=fault, **few)
    training.result()
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert (left["learner"], left["where"]) == ("learner-2", "fit_model")
    assert "ValueError: bad batch" in left["reason"]
    assert [data["participants"] for data in training.reports("round.finished")] == [4, 3, 3]
    assert training.agents["agents"].wait(10) == 0
    assert training.measured("fits")[2] == dict.fromkeys(["learner-1", "learner-3", "learner-4"], 3)


def test_a_learner_whose_code_ends_the_worker_is_out_and_its_neighbours_load_again(train: Train) -> None:
    few = {"min_available_learners": 3, "min_fit_learners": 3, "min_evaluate_learners": 3}
    training = train(fault="if self.fits == 2 and len(self.y) == 60: os._exit(9)", **few)
    training.result()
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert left["learner"] == "learner-2"
    assert "exit code 9" in left["reason"]
    last = training.measured("fits")[2]
    assert (last["learner-1"], last["learner-3"]) == (3, 3)
    assert last["learner-4"] in (1, 2)  # it began anew, in the second round or in the third
    assert "learner-2" not in last
    assert not [data for data in training.reports("learner.left") if not data["final"]]


def test_learners_go_on_when_their_worker_is_killed(train: Train) -> None:
    training = train(rounds=4, fault="import time; time.sleep(0.2)")
    training.wait_for_round(1)
    before = {worker.pid for worker in workers_of(training)}
    kill_a_worker(training)
    training.result()
    assert [data["participants"] for data in training.reports("round.finished")] == [4] * 4
    assert len({pid for pids in training.measured("pid") for pid in pids.values()} - before) == 1
    assert training.reports("learner.left") == []
    last = sorted(training.measured("fits")[-1].values())
    assert last[0] < 4
    assert last[2:] == [4, 4]


def test_a_worker_that_is_killed_again_and_again_ends_the_learner_at_whose_turn_it_is(train: Train) -> None:
    few = {"min_available_learners": 3, "min_fit_learners": 3, "min_evaluate_learners": 3}
    training = train(fault="if len(self.y) == 60: os.kill(os.getpid(), 9)", rounds=2, **few)
    training.result()
    (left,) = [data for data in training.reports("learner.left") if data["final"]]
    assert left["learner"] == "learner-2"
    assert "SIGKILL" in left["reason"]


def test_the_agent_ends_with_an_error_when_its_last_learner_has(train: Train) -> None:
    few = {"min_available_learners": 1, "min_fit_learners": 1, "min_evaluate_learners": 1}
    training = train(fault="raise ValueError('all of them')", **few)
    assert training.agents["agents"].wait(30) == 1
    assert training.aggregator.wait(30) == 1
    assert [data["final"] for data in training.reports("learner.left")] == [True] * 4


def test_a_killed_agent_goes_on_with_all_its_learners(train: Train) -> None:
    training = train(rounds=3, fault="import time; time.sleep(0.2)")
    training.wait_for_round(1)
    training.agents["agents"].kill()
    training.agents["agents"].wait(10)
    training.agents["agents"] = training._start("flops.agent", "agents")
    training.result()
    assert [data["participants"] for data in training.reports("round.finished")] == [4] * 3


def test_all_learners_come_back_to_a_killed_aggregator_and_the_bits_are_the_same(train: Train) -> None:
    undisturbed = train(rounds=5).result()
    training = train(rounds=5)
    for committed in (1, 3):
        training.wait_for_round(committed)
        training.aggregator.kill()
        training.aggregator.wait(10)
        training.aggregator = training.start_aggregator()
    assert training.result() == undisturbed
    assert training.agents["agents"].wait(10) == 0


def test_nothing_is_left_when_the_agent_is_told_to_end(train: Train) -> None:
    training = train(rounds=1000)
    training.wait_for_round(1)
    workers = workers_of(training)
    assert len(workers) == 2
    training.agents["agents"].terminate()
    assert training.agents["agents"].wait(10) == 143
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker.pid}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
