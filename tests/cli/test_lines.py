"""What is said of trainings that are more than rounds of learners, line by line."""

from typing import Any

import pytest
from rich.console import Console

from flops.cli.lines import Lines
from flops.cli.live import Status
from flops.cli.progress import Progress
from flops.client.events import ProjectEvent

ROUND = {"participants": 2, "cohort": 2, "metrics": {"loss": 0.5, "accuracy": 0.75}, "duration_s": 1.5}


class Screen:
    """A project as it is watched through a pipe, and the moving part of a terminal."""

    def __init__(self, mode: str = "classic") -> None:
        self.progress = Progress(rounds_total=3, mode=mode)
        self._lines = Lines(self.progress, verbose=True)

    def tell(self, kind: str, **data: Any) -> str:
        event = ProjectEvent(1, 100.0, kind, data, {})
        self.progress.apply(event)
        return "\n".join(line.plain for line in self._lines.lines(event))

    def moving_part(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(Status(self.progress, now=lambda: 100.0))
        return capture.get()


def test_a_hierarchy_is_told_in_cycles_and_what_its_clusters_do_beside_it() -> None:
    screen = Screen(mode="hierarchical")
    screen.tell("project.state", state="training")
    assert screen.tell("training.waiting", connected=1, expected=2) == (
        "    waiting for clusters: 1 of 2 connected"
    )
    assert screen.tell("training.waiting", cluster="asia", connected=1, expected=2) == ""
    assert "waiting for clusters: 0 of 2 connected" in screen.moving_part()
    screen.tell("learner.connected", cluster="asia", learner="learner-1")
    screen.tell("cluster.connected", cluster="asia")
    screen.tell("round.started", round=2, cohort=["asia", "europe"])
    screen.tell("round.started", cluster="asia", round=5, cohort=["learner-1"])
    assert "waiting" not in screen.moving_part()
    inner = {**ROUND, "round": 5, "rounds": 9, "cycle": 2, "left_out": {"learner-4": "it did not answer"}}
    told = screen.tell("cluster.round", cluster="asia", **inner)
    assert told.splitlines() == [
        "    cluster asia: round 5 of 9, 2 of 2 learners, 1.5 s",
        "  ! cluster asia, round 5: learner-4 left out - it did not answer",
    ]
    screen.tell("cluster.round", cluster="europe", **{**inner, "left_out": {}})
    screen.tell("cluster.round", cluster="europe/north", **{**inner, "left_out": {}})
    moving = screen.moving_part()
    assert "cycle 2 of 3: 0 of 2 clusters have answered" in moving
    (asia,) = (line for line in moving.splitlines() if "asia" in line)
    assert asia.split() == ["asia", "round", "5", "of", "9", "2", "of", "2", "learners", "1.5", "s"]
    assert "2 of 2 clusters" in next(line for line in moving.splitlines() if line.startswith("  europe "))
    told = screen.tell("round.finished", round=2, **ROUND, left_out={"europe": "it never came"})
    heading, line, left_out = told.splitlines()
    assert heading.split() == ["cycle", "loss", "accuracy", "clusters", "time"]
    assert line.split()[:4] == ["2/3", "0.5000", "75.0", "%"]
    assert left_out == "  ! cycle 2: europe left out - it never came"
    assert "2 of 3 cycles" in screen.moving_part()


def test_clusters_that_the_root_forms_are_told_with_how_far_away_they_are() -> None:
    told = Screen(mode="hierarchical").tell(
        "clusters.formed",
        clusters={"near": ["learner-1", "learner-3"], "far": ["learner-2"]},
        round_trip_ms={"learner-1": 0.21, "learner-3": 0.4},
    )
    assert told.splitlines() == [
        "    cluster near: 2 learners, at most 0.4 ms away",
        "    cluster far: 1 learner",
    ]


def test_learners_that_others_were_quicker_than_are_no_problem_of_the_round() -> None:
    screen = Screen()
    left_out = {"learner-3": "enough others were quicker", "learner-4": "it did not answer within 5 s"}
    late = screen.tell("update.refused", round=1, learner="learner-3", reason="it answers train-1", late=True)
    assert late == "    round 1: update of learner-3 came too late"
    told = screen.tell(
        "round.finished", round=1, **{**ROUND, "cohort": 4}, left_out=left_out, bytes_up=10, bytes_down=20
    )
    _, line, problem = told.splitlines()
    assert line.endswith("2/4      1.5 s   20 B down, 10 B up, 1 not needed")
    assert problem == "  ! round 1: learner-4 left out - it did not answer within 5 s"


def test_an_ejected_learner_is_told_once() -> None:
    screen = Screen()
    told = screen.tell("learner.ejected", learner="learner-2", reason="3 of its answers were refused")
    assert told == "  ! learner-2 is ejected - 3 of its answers were refused"
    assert screen.tell("learner.left", learner="learner-2", reason="it was ejected") == ""


def test_an_asynchronous_round_tells_its_version_and_how_stale_its_updates_were() -> None:
    screen = Screen(mode="asynchronous")
    screen.tell("project.state", state="training")
    screen.tell("round.started", round=1, cohort=4)
    screen.tell("update.received", round=1, learner="learner-1")
    assert "round 1: 1 updates so far" in screen.moving_part()
    told = screen.tell("round.finished", round=1, **ROUND, version=7, staleness={"mean": 1.25, "max": 4})
    assert told.splitlines()[1].split()[4:] == [
        "2", "1.5", "s", "version", "7,", "staleness", "1.2,", "at", "most", "4",
    ]  # fmt: skip


@pytest.mark.parametrize("state", ["finished", "paused"])
def test_a_project_that_goes_on_after_a_rest_counts_the_time_of_its_work_only(state: str) -> None:
    progress = Progress(rounds_total=2)

    def at(time: float, **data: Any) -> None:
        progress.apply(ProjectEvent(1, time, "project.state", data, {}))

    at(100.0, state="submitted")
    at(110.0, state=state)
    assert progress.took_s == 10.0
    at(500.0, state="deploying", rounds_total=5)
    assert progress.rounds_total == 5
    at(503.0, state="finished")
    assert progress.took_s == 13.0
