"""Whole projects, from the command line to the end."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]

User = Any
Repository = Any


def test_the_same_seed_gives_the_same_model_to_the_bit(user: User, repository: Repository) -> None:
    folder = repository()
    digests = []
    for seed in ("3", "3", "4"):
        project = user.project(
            str(folder), "--tag", "e2e", "--rounds", "3", "--min-learners", "3", "--seed", seed
        )
        assert project["state"] == "finished", project["reason"]
        digests.append(_model(user, project["id"]))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_several_projects_run_at_once(user: User, repository: Repository) -> None:
    folder = repository()
    ids = [
        user.flops(
            "run", str(folder), "--tag", "e2e", "--rounds", "4", "--name", f"at-once-{number}",
            "--detach", "--json",
        ).document["id"]
        for number in range(3)
    ]  # fmt: skip
    for project in ids:
        attached = user.flops("attach", project, "--json")
        assert attached.code == 0, attached.stdout
        assert attached.lines[-1]["state"] == "finished"


def test_a_stopped_project_leaves_no_process_behind_within_five_seconds(
    user: User, repository: Repository
) -> None:
    # The user's code starts a process of its own that leaves its session: it must go, too.
    folder = repository(
        header="import subprocess, time\n",
        data="subprocess.Popen(['sleep', '7777'], start_new_session=True)",
        fit="time.sleep(0.5)",
    )
    submitted = user.flops("run", str(folder), "--tag", "e2e", "--rounds", "500", "--detach", "--json")
    project = submitted.document["id"]
    deadline = time.monotonic() + 90
    while not user.events(project, "round.finished"):
        assert time.monotonic() < deadline, user.flops("events", project).stdout
    assert _processes_of(project)
    start = time.monotonic()
    assert user.flops("stop", project).code == 0
    shown = user.flops("show", project, "--json").document
    while shown["state"] != "stopped":
        assert time.monotonic() - start < 5, shown
        shown = user.flops("show", project, "--json").document
    assert not _processes_of(project)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "7777"]]


def test_a_training_that_was_paused_arrives_at_the_same_bits(user: User, repository: Repository) -> None:
    folder = repository(header="import time\n", fit="time.sleep(0.5)")
    options = ("--tag", "e2e", "--rounds", "30", "--min-learners", "3", "--seed", "3")
    undisturbed = user.project(str(folder), *options)
    assert undisturbed["state"] == "finished", undisturbed["reason"]
    project = user.flops("run", str(folder), *options, "--detach", "--json").document["id"]
    for rounds in (1, 6):
        _wait_for_rounds(user, project, rounds)
        paused = user.flops("pause", project, "--json")
        assert [one["state"] for one in paused.document] == ["paused"], paused.stderr
        assert not _processes_of(project)
        again = user.flops("pause", project)
        assert again.code == 0
        resumed = user.flops("resume", project)
        assert resumed.code == 0, resumed.stderr
        refused = user.flops("resume", project)
        assert refused.code == 1
        assert "it goes on by itself" in refused.stderr
    watched = user.flops("attach", project, "--json")
    assert watched.code == 0, watched.stdout
    assert watched.lines[-1]["state"] == "finished"
    assert [data["round"] for data in user.events(project, "round.finished")] == list(range(1, 31))
    assert _model(user, project) == _model(user, undisturbed["id"])
    refused = user.flops("pause", project)
    assert refused.code == 1
    assert f"project {project} is finished" in refused.stderr


def test_an_extended_project_arrives_at_the_bits_of_one_that_had_all_rounds_from_the_start(
    user: User, repository: Repository
) -> None:
    folder = repository()
    options = ("--tag", "e2e", "--min-learners", "3", "--seed", "3", "--strategy", "FedAdam")
    whole = user.project(str(folder), *options, "--rounds", "6")
    assert whole["state"] == "finished", whole["reason"]
    project = user.project(str(folder), *options, "--rounds", "2")["id"]
    for rounds in (1, 3):
        extended = user.flops("extend", project, "--rounds", str(rounds), "--json")
        assert extended.code == 0, extended.stderr
        refused = user.flops("extend", project, "--rounds", "1")
        assert refused.code == 1
        assert "wait until it has finished" in refused.stderr
        watched = user.flops("attach", project, "--json")
        assert watched.code == 0, watched.stdout
        assert watched.lines[-1]["state"] == "finished"
    shown = user.flops("show", project, "--json").document
    assert (shown["rounds_done"], shown["rounds_total"], shown["best_round"]) == (
        6,
        6,
        whole["best_round"],
    )
    assert [data["round"] for data in user.events(project, "round.finished")] == list(range(1, 7))
    assert [data["rounds"] for data in user.events(project, "training.finished")] == [2, 3, 6]
    for name in ("model.safetensors", "global-6.safetensors"):
        assert _model(user, project, name) == _model(user, whole["id"], name)


def test_a_paused_project_outlives_its_manager_and_is_no_reason_to_keep_it(
    user: User, repository: Repository
) -> None:
    folder = repository(header="import time\n", fit="time.sleep(0.3)")
    submitted = user.flops("run", str(folder), "--tag", "e2e", "--rounds", "50", "--detach", "--json")
    project = submitted.document["id"]
    assert user.flops("pause", project).code == 0  # while it prepares
    down = user.flops("down")
    assert down.code == 0, down.stderr
    assert user.flops("show", project, "--json").document["state"] == "paused"
    assert user.flops("resume", project).code == 0
    _wait_for_rounds(user, project, 1)
    assert user.flops("pause", project).code == 0
    assert user.flops("stop", project, "--json").document[0]["state"] == "stopped"
    assert user.flops("rm", project).code == 0


def _wait_for_rounds(user: User, project: str, rounds: int) -> None:
    deadline = time.monotonic() + 90
    while len(user.events(project, "round.finished")) < rounds:
        assert time.monotonic() < deadline, user.flops("events", project).stdout


def _model(user: User, project: str, name: str = "model.safetensors") -> bytes:
    return bytes((user.home / "projects" / project / "state" / name).read_bytes())


def test_a_hierarchy_arrives_at_the_same_bits_whatever_happens_to_its_parts(
    user: User, repository: Repository, tmp_path: Path
) -> None:
    folder = repository(header="import time\n", fit="time.sleep(0.2)")
    spec = tmp_path / "nested.yaml"
    groups = {"europe/north": ["north"], "europe/south": ["south"], "america": ["west"]}
    training = {"rounds": 2, "cycles": 10, "seed": 3, "min_clusters": 2, "clusters": {"groups": groups}}
    spec.write_text(json.dumps({"repo": str(folder), "data": {"tags": ["e2e"]}, "training": training}))
    undisturbed = user.project("--spec", str(spec))
    assert (undisturbed["state"], undisturbed["rounds_done"]) == ("finished", 10), undisturbed["reason"]
    tree = [(one["id"], one["parent"], one["rounds_done"]) for one in undisturbed["clusters"]]
    assert tree == [
        ("america", None, 20),
        ("europe", None, 10),
        ("europe/north", "europe", 20),
        ("europe/south", "europe", 20),
    ]
    assert {one["site"]: one["cluster"] for one in undisturbed["learners"]} == {
        "north": "europe/north",
        "south": "europe/south",
        "west": "america",
    }
    assert {one["state"] for one in undisturbed["learners"] + undisturbed["clusters"]} == {"done"}

    submitted = user.flops("run", "--spec", str(spec), "--cycles", "9", "--detach", "--json")
    project = submitted.document["id"]
    _wait_for_rounds(user, project, 1)
    for service in user.flops("show", project, "--json").document["services"]:
        if service["cluster"] in ("europe", "america"):
            psutil.Process(service["pid"]).kill()
    _wait_for_rounds(user, project, 4)
    assert user.flops("pause", project).code == 0
    assert not _processes_of(project)
    assert "america" in user.flops("show", project).stdout
    assert user.flops("resume", project).code == 0
    assert user.flops("attach", project).code == 0
    assert user.flops("extend", project, "--rounds", "1").code == 0
    watched = user.flops("attach", project)
    assert watched.code == 0, watched.stdout
    assert "extended by 1 cycle" in watched.stdout
    cycles = user.events(project, "round.finished")
    assert [(data["cycle"], data["cycles"]) for data in cycles] == [
        (number, 9 if number < 10 else 10) for number in range(1, 11)
    ]
    for name in ("model.safetensors", "global-10.safetensors"):
        assert _model(user, project, name) == _model(user, undisturbed["id"], name)


def test_a_learner_whose_updates_are_refused_is_ejected_and_shown_with_the_reason(
    user: User, repository: Repository, tmp_path: Path
) -> None:
    for site, rows in (("good", 20), ("bad", 21)):
        table = tmp_path / f"{site}.csv"
        table.write_text("x,y\n" + "".join(f"{number},1\n" for number in range(rows)))
        assert user.flops("data", "put", str(table), "--tag", "mixed", "--site", site).code == 0
    folder = repository(
        header="from flops_utils.ml_repo_building_blocks import load_dataset\n",
        data="self.rows = len(load_dataset())",
        fit="self.parameters[0][0, 0] *= float('nan') if self.rows == 21 else 1.0",
    )
    project = user.project(str(folder), "--tag", "mixed", "--rounds", "4")
    assert project["state"] == "finished", project["reason"]
    states = {one["site"]: (one["state"], one["reason"]) for one in project["learners"]}
    assert states["good"] == ("done", None)
    state, reason = states["bad"]
    assert state == "ejected"
    assert reason == "3 of its answers were refused, the last because it contains NaN or infinite values"
    shown = user.flops("show", project["id"]).stdout
    assert reason in " ".join(shown.split())  # in lines as long as whoever started the tests has them
    rounds = user.events(project["id"], "round.finished")
    assert [data["participants"] for data in rounds] == [1] * 4


@pytest.mark.parametrize(
    ("clusters", "options", "problem"),
    [
        (
            {"groups": {"a": ["north", "rome"]}},
            [],
            "puts 'rome' into cluster a, but no chosen site is called so",
        ),
        (
            {"groups": {"a": ["north"]}},
            [],
            "training.clusters.groups has no cluster for south, west - add them",
        ),
        (
            {"count": 3},
            ["--min-learners", "2"],
            "cluster cluster-1 has 1 learner, but a round inside a cluster",
        ),
        ({"label": "region"}, [], "site 'north' has no label for 'region'"),
    ],
)
def test_clusters_that_cannot_be_formed_fail_the_project_with_the_reason(
    user: User, repository: Repository, tmp_path: Path, clusters: Any, options: list[str], problem: str
) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(
        json.dumps({"repo": str(repository()), "data": {"tags": ["e2e"]}, "training": {"clusters": clusters}})
    )
    project = user.project("--spec", str(spec), *options)
    assert project["state"] == "failed"
    assert problem in project["reason"]


def test_a_thesis_sla_runs_as_it_is(user: User, repository: Repository, tmp_path: Path) -> None:
    sla = tmp_path / "sla.json"
    sla.write_text(
        "// as the thesis writes it\n"
        + json.dumps(
            {
                "customerID": "Admin",
                "verbose": True,
                "ml_repo_url": str(repository()),
                "ml_model_flavor": "sklearn",
                "training_configuration": {
                    "data_tags": ["e2e"],
                    "training_rounds": 2,
                    "min_available_clients": 2,
                    "min_fit_clients": 2,
                    "min_evaluate_clients": 2,
                },
                "resource_constraints": {"memory": 1000, "vcpus": 1, "storage": 0},
            }
        )
    )
    project = user.project("--spec", str(sla))
    assert (project["state"], project["rounds_done"]) == ("finished", 2), project["reason"]


def test_a_removed_project_is_gone_with_its_folder(user: User, repository: Repository) -> None:
    project = user.project(str(repository()), "--tag", "e2e", "--rounds", "1")
    folder = user.home / "projects" / project["id"]
    assert folder.exists()
    assert user.flops("rm", project["id"]).code == 0
    assert not folder.exists()
    assert project["id"] not in user.flops("ls", "--json").stdout


def _processes_of(project: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            marker = process.environ().get("FLOPS_SERVICE", "")
        except psutil.Error:
            continue
        if marker.startswith(f"{project}-") and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
