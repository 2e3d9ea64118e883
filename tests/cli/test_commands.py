import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Flops, StandIn

PROJECT = "p-7k2mqd"


def test_ls_shows_the_newest_first(stand_in: "StandIn", flops: "Flops") -> None:
    assert flops("ls").err.startswith("no projects yet - start one with 'flops run REPO'")
    stand_in.add_project("p-older2", created=time.time() - 7200, state="failed", reason="no\ndata")
    stand_in.add_project(
        metrics={"accuracy": 0.9}, rounds_done=2, model={"name": "mnist", "version": 3, "uri": "u"}
    )
    lines = flops("ls").out.splitlines()
    assert lines[0].split() == ["id", "name", "state", "round", "accuracy", "created", "remark"]
    assert lines[1].split() == [PROJECT, "mnist", "submitted", "2/2", "90.0", "%", "0", "s", "ago", "mnist:3"]
    assert lines[2].split() == ["p-older2", "mnist", "failed", "0/2", "-", "2", "h", "ago", "no"]
    assert [project["id"] for project in flops("ls", "--json").json] == [PROJECT, "p-older2"]


def test_show_tells_all_about_a_project(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project(
        commit="1a2b3c",
        reason="why",
        metrics={"loss": None, "accuracy": 0.5},
        spec={
            "training": {"strategy": {"name": "FedAdam", "parameters": {"eta": 0.1}}},
            "data": {"tags": ["a", "b"]},
        },
        learners=[{"id": "learner-1", "site": "clinic", "state": "left", "reason": "out of memory"}],
        services=[
            {"name": "p-7k2mqd-aggregator", "state": "running", "restarts": 1, "reason": None, "pid": 4}
        ],
    )
    out = flops("show", PROJECT).out
    for text in ("why", "1a2b3c", "a, b", "FedAdam (eta=0.1)", "accuracy 50.0 %, loss -", "out of memory"):
        assert text in out
    assert "p-7k2mqd-aggregator  running" in out
    assert flops("show", PROJECT, "--json").json["commit"] == "1a2b3c"


def test_show_draws_a_hierarchy(stand_in: "StandIn", flops: "Flops") -> None:
    def member(name: str, **values: Any) -> dict[str, Any]:
        return {"id": name, "state": "connected", "reason": None} | values

    stand_in.add_project(
        spec={"training": {"mode": "hierarchical"}},
        clusters=[
            member("asia", parent=None, rounds_done=4),
            member("europe", parent=None, rounds_done=0, state="left", reason="no learner is there"),
            member("europe/north", parent="europe", rounds_done=0),
        ],
        learners=[
            member("learner-1", site="osaka", cluster="asia"),
            member("learner-2", site="oslo", cluster="europe/north", state="ejected", reason="NaN"),
            member("learner-3", site="lima", cluster=None, state="waiting"),
        ],
    )
    out = flops("show", PROJECT).out
    assert "cycles      0 of 2" in out
    lines = [line.split() for line in out[out.index("root") :].splitlines()]
    assert lines == [
        ["root"],
        ["├──", "asia", "connected", "4", "rounds"],
        ["│", "└──", "learner-1", "osaka", "connected"],
        ["├──", "europe", "left", "no", "learner", "is", "there"],
        ["│", "└──", "north", "connected"],
        ["│", "└──", "learner-2", "oslo", "ejected", "NaN"],
        ["└──", "learner-3", "lima", "waiting"],
    ]


def test_a_hierarchy_of_many_learners_is_drawn_with_those_that_matter(
    stand_in: "StandIn", flops: "Flops"
) -> None:
    learners = [
        {"id": f"learner-{n}", "site": f"s{n}", "cluster": "asia", "state": "done", "reason": None}
        for n in range(1, 1001)
    ]
    learners[499] |= {"state": "ejected", "reason": "3 of its answers were refused"}
    asia = {"id": "asia", "parent": None, "state": "done", "reason": None, "rounds_done": 2}
    stand_in.add_project(learners=learners, clusters=[asia])
    out = flops("show", PROJECT).out
    assert "├── learner-500  s500  ejected  3 of its answers were refused" in out
    assert "└── 1000 learners: 999 done, 1 ejected" in out
    assert out.count("learner-") == 1


def test_extend_says_how_it_goes_on(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project(state="finished")
    assert flops("extend", PROJECT).code == 2  # how many?
    extended = flops("extend", PROJECT, "--rounds", "3")
    assert extended.out == "p-7k2mqd  deploying  watch it with 'flops attach p-7k2mqd'\n"
    assert stand_in.requests[-1] == ("POST", "extend", {"rounds": 3})


def test_logs_cannot_steer_the_terminal(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project()
    assert flops("logs", PROJECT, "--tail", "1").out == (
        "==> p-7k2mqd-aggregator\ntwo\n==> p-7k2mqd-learner-1\nred\N{REPLACEMENT CHARACTER}\n"
    )
    assert flops("logs", PROJECT, "--service", "p-7k2mqd-aggregator").out == "one\ntwo\n"
    assert flops("logs", PROJECT, "--json").json["p-7k2mqd-learner-1"] == "\x1b[31mred\x07\n"


def test_events_are_listed_and_followed(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project()
    stand_in.emit("step.finished", step="fetch", duration_s=0.25)
    stand_in.emit("project.state", state="finished", reason=None)
    lines = flops("events", PROJECT).out.splitlines()
    assert lines[0].split()[0] == "1"
    assert lines[0].endswith("step.finished     step=fetch  duration_s=0.25")
    for arguments in (["--after", "1"], ["--after", "1", "--follow"]):
        (line,) = flops("events", PROJECT, "--json", *arguments).out.splitlines()
        assert json.loads(line)["data"] == {"state": "finished", "reason": None}
    assert flops("events", "p-none22", "--follow").code == 1


def test_stop_waits_for_the_end_and_rm_removes(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project(state="training")
    refused = flops("rm", PROJECT)
    assert refused.code == 1
    assert "error: project p-7k2mqd is training - stop it first" in refused.err
    assert flops("stop", PROJECT).out == "p-7k2mqd  stopped\n"
    assert flops("rm", PROJECT, "--json").json == {"removed": [PROJECT]}
    stand_in.add_project(state="training")
    assert flops("rm", "--force", PROJECT).out == "removed p-7k2mqd\n"
    assert stand_in.projects == {}


def test_pause_waits_for_it_and_resume_tells_how_to_watch(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project(state="training", rounds_done=1)
    assert flops("pause", PROJECT).out == "p-7k2mqd  paused\n"
    watched = flops("attach", PROJECT)
    assert watched.code == 1
    assert "paused" in watched.out
    assert "after 1 of 2 rounds" in watched.out
    assert "flops resume p-7k2mqd" in watched.out
    assert flops("resume", PROJECT).out == "p-7k2mqd  deploying  watch it with 'flops attach p-7k2mqd'\n"
    stand_in.emit("project.state", state="finished", reason=None)
    watched = flops("attach", PROJECT)
    assert watched.code == 0
    assert [word for word in watched.out.split() if word in ("paused", "resumed", "finished")] == [
        "paused",
        "resumed",
        "finished",
    ]
    assert flops("pause", PROJECT).err == "error: project p-7k2mqd is finished - it cannot be paused\n"


# data


def test_parquet_is_sent_as_it_is_and_csv_as_parquet(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path
) -> None:
    parquet, table = tmp_path / "a.parquet", tmp_path / "b.csv"
    parquet.write_bytes(b"PAR1 and so on")
    table.write_text("x,y\n1,2\n")
    out = flops("data", "put", str(parquet), str(table), "--tag", "a b", "-t", "c", "--site", "clinic").out
    assert out.splitlines()[1].split() == [
        "f-1", "clinic", "20,000", "14", "B", "a", "b,", "c",
    ]  # fmt: skip
    bodies = [body for _, path, body in stand_in.requests if path == "/v1/data/fragments"]
    assert bodies[0] == b"PAR1 and so on"
    assert bodies[1].startswith(b"PAR1")
    assert flops("data", "ls", "--tag", "c", "--json").json[0]["tags"] == ["a b", "c"]
    assert flops("data", "ls", "--tag", "none").err.startswith("no data - add some with")


def test_a_file_that_is_no_table_is_refused_before_it_is_sent(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path
) -> None:
    file = tmp_path / "a.parquet"
    file.write_text("nothing")
    outcome = flops("data", "put", str(file), "--tag", "a")
    assert outcome.code == 1
    assert f"'{file}' is no Parquet file - give a .parquet or a .csv file" in outcome.err
    assert flops("data", "put", str(file)).code == 2
    assert not stand_in.requests


def test_mocked_data_and_their_removal(stand_in: "StandIn", flops: "Flops") -> None:
    assert flops("data", "mock", "mnist", "--sites", "2", "--alpha", "0.3").code == 0
    assert stand_in.requests[-1][2] == {
        "dataset": "mnist", "tags": ["mnist"], "sites": 2, "partition": "dirichlet", "alpha": 0.3, "seed": 0,
        "shards_per_site": 2, "test_split": False,
    }  # fmt: skip
    assert flops("data", "rm", "f-1").out == "removed f-1\n"
    assert flops("data", "rm", "f-2").code == 1


# models


def model(name: str, version: int) -> dict[str, Any]:
    return {
        "name": name,
        "version": version,
        "project": PROJECT,
        "round": 4,
        "metrics": {"accuracy": 0.9, "loss": 0.1},
        "created": time.time(),
        "uri": f"models:/{name}/{version}",
    }


Tar = Callable[[dict[str, bytes | tarfile.TarInfo]], bytes]


def test_the_newest_version_is_downloaded_unless_one_is_named(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tar_of: Tar
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_in.models = [model("mnist", 2), model("mnist", 10), model("other", 11)]
    stand_in.archive = tar_of({"model/MLmodel": b"flavors", "parameters.safetensors": b"1234"})
    assert [line.split()[0] for line in flops("models").out.splitlines()] == [
        "model", "mnist:10", "mnist:2", "other:11",
    ]  # fmt: skip
    outcome = flops("model", "get", "mnist", "--json")
    assert outcome.json == {
        "name": "mnist",
        "version": "10",
        "folder": f"{tmp_path}/mnist-10",
        "files": ["model/MLmodel", "parameters.safetensors"],
    }
    assert (tmp_path / "mnist-10/model/MLmodel").read_bytes() == b"flavors"
    assert flops("model", "get", "mnist:2", "--out", "a/b").code == 0
    assert stand_in.requests[-1][2] == ("mnist", 2)
    again = flops("model", "get", "mnist:2", "--out", "a/b")
    assert again.code == 1
    assert "exists already - choose another place with --out" in again.err
    unknown = flops("model", "get", "nist")
    assert "there is no model 'nist' - registered are: mnist, other" in unknown.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["a", "mnist-10"]


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "entries",
    [
        {"../evil": b"x"},
        {"a/../../evil": b"x"},
        {"/tmp/evil": b"x"},
        {"evil": link("evil", "/etc/passwd")},
        {"dir": link("dir", "/tmp"), "dir/evil": b"x"},
    ],
)
def test_an_archive_that_reaches_outside_is_refused_whole(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path, tar_of: Tar, entries: dict[str, Any]
) -> None:
    stand_in.archive = tar_of({"good": b"x"} | entries)
    outcome = flops("model", "get", "mnist:1", "--out", str(tmp_path / "out/model"))
    assert outcome.code == 1
    assert "is no plain file below it - nothing was unpacked" in outcome.err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cut_off_archive_is_refused_whole(
    stand_in: "StandIn", flops: "Flops", tmp_path: Path, tar_of: Tar
) -> None:
    stand_in.archive = tar_of({"good": b"x" * 100_000})[:50_000]
    outcome = flops("model", "get", "mnist:1", "--out", str(tmp_path / "out/model"))
    assert "the model's archive is damaged" in outcome.err
    assert list((tmp_path / "out").iterdir()) == []


# the manager


def test_ui_up_version_and_down(stand_in: "StandIn", flops: "Flops") -> None:
    assert flops("ui").out == "http://127.0.0.1:5000\n"
    assert "the manager was running already: http://127.0.0.1:" in flops("up").out
    assert flops("version", "--json").json == {"flops": "0.1.0", "manager": "9.9"}
    assert flops("down").out == "the manager is stopped\n"
    assert stand_in.requests[-1][2] == {"force": False}
    assert flops("down", "--json").json == {"was_running": False}
    assert flops("version").out == "flops 0.1.0, no manager is running\n"


def test_help_is_there_for_every_command(flops: "Flops") -> None:
    out = flops("--help").out
    assert "Federated training" in out
    assert flops("data", "--help").code == 0
    assert "flops run . --mock mnist --learners 3 --alpha 0.5" in flops("run", "--help").out


def test_a_list_of_projects_is_filtered_by_the_manager(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project("p-one222", created=1.0)
    stand_in.add_project("p-two222", created=2.0)
    states = ("--state", "failed", "--state", "paused")
    ended = flops("ls", *states, "--name", "mnist", "--search", "x y", "--last", "1", "--json")
    assert [project["id"] for project in ended.json] == ["p-two222"]
    assert stand_in.requests[-1] == (
        "GET",
        "/v1/projects",
        "state=failed&state=paused&name=mnist&text=x+y&limit=1",
    )


def test_a_failed_project_is_attempted_again(stand_in: "StandIn", flops: "Flops") -> None:
    stand_in.add_project("p-one222", state="failed")
    ended = flops("retry", "p-one222")
    assert (ended.code, "preparing" in ended.out, "flops attach p-one222" in ended.out) == (0, True, True)
