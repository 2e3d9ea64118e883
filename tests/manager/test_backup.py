"""Backups, from each engine into each, and archives that somebody else has made."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from flops.core.clock import ManualClock
from flops.core.errors import ConflictError, InvalidInputError
from flops.core.events import EventKind
from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.core.settings import Settings
from flops.identity import AuditLog, IdentityStore, Role
from flops.manager import restore as restoring
from flops.manager.backup import Backup, reflected
from flops.manager.databases import open_own_database
from flops.manager.home import claim_home
from flops.manager.paths import ProjectPaths, models_dir, write_private
from flops.manager.reports import Report
from flops.manager.restore import restore
from flops.manager.rows import Deployment, Learner, Model, Service
from flops.manager.states import Observation, State
from flops.manager.store import Store
from flops.persistence import reading
from tests.postgres import PostgresServer

ENGINES = ("sqlite", "postgresql")
FINISHED, TRAINING, STOPPED, PAUSED = (ProjectId(f"p-{name}") for name in ("fini", "trai", "stop", "paus"))
ODD_NAME = "a\n\udcff\N{NO-BREAK SPACE}b"
NO_JSON = "\\u0000 \N{SNOWMAN} \0 \x1b[31m"
NewHome = Callable[[str], Settings]


@pytest.fixture
def new_home(tmp_path: Path, request: pytest.FixtureRequest) -> NewHome:
    """Settings of an empty home on that engine."""
    count = iter(range(10))

    def make(engine: str) -> Settings:
        url = None
        if engine == "postgresql":
            server: PostgresServer = request.getfixturevalue("postgres")
            url = server.database()
        return Settings(home=tmp_path / f"home-{next(count)}", database_url=url)

    return make


def fill(settings: Settings) -> None:
    """What a manager has after some days."""
    settings.home.mkdir(parents=True)
    clock = ManualClock()
    engine = open_own_database(settings)
    store, identity, audit = Store(engine, clock), IdentityStore(engine, clock), AuditLog(engine, clock)
    identity.ensure_admin()
    identity.add_user("ann", Role.ENGINEER, ["vision"])
    identity.add_token("ann", "laptop")
    for project in (FINISHED, TRAINING, STOPPED, PAUSED):
        clock.advance(0.123456789)
        spec = {"repo": "/r", "training": {"mode": "flat"}, "name": NO_JSON}
        store.create_project(project, name="mnist", spec=spec, source="/r", rounds_total=3)
        write_private(ProjectPaths.of(settings, project).config / "spec.json", json.dumps({"key": project}))
        store.observe(project, Observation(begun=True))
        store.start_step(project, "data")
        store.finish_step(project, "data", {"sites": []}, learners=[Learner(LearnerId("learner-1"), 1, "a")])
        store.observe(project, Observation(prepared=True))
        store.want_services(project, [Service(ServiceName(f"{project}-aggregator"), "aggregator", None)])
        store.observe(project, Observation(deployed=True))
        data = {"round": 1, "metrics": {"loss": 0.1 + 0.2}}
        store.accept_reports(project, "aggregator", [Report(1, 5.5, EventKind.ROUND_FINISHED, data)])
    store.start_step(FINISHED, "export-environment")
    store.finish_step(FINISHED, "export-environment", {"python": "/nowhere/bin/python"})
    end = {"rounds": 1, "best_round": 1}
    store.accept_reports(FINISHED, "aggregator", [Report(2, 6.0, EventKind.TRAINING_FINISHED, end)])
    store.observe(FINISHED, Observation(trained=True))
    store.observe(FINISHED, Observation(packaged=True))
    store.set_cleaned(FINISHED)
    store.observe(STOPPED, Observation(stop_requested=True), "stop was requested")
    store.observe(STOPPED, Observation(services_gone=True))
    store.observe(PAUSED, Observation(pause_requested=True))
    store.observe(PAUSED, Observation(services_gone=True))
    folder = settings.home / "mlartifacts" / "1"
    write_private(folder / "model" / "MLmodel", "flavors: {}")
    write_private(folder / "parameters.safetensors", "1" * 5000)
    write_private(folder / ODD_NAME, "")
    metrics = {"loss": 1 / 3}
    store.add_model(Model("mnist", 1, FINISHED, 1, metrics, 1.5, "models:/mnist/1", str(folder)))
    store.add_model(Model("mnist", 2, FINISHED, None, {}, 2.5, "models:/mnist/2", "/elsewhere"))
    store.set_deployment(Deployment(FINISHED, "mnist", 1, "mlflow", None, 3.0))
    audit.append(
        user="ann",
        token="",
        address="::1",
        action="POST /v1/projects",
        object=NO_JSON,
        outcome=201,
        detail={},
    )
    store.close()


def back_up(settings: Settings) -> Path:
    engine = open_own_database(settings)
    archive = settings.home.with_suffix(".tar")
    archive.write_bytes(b"".join(Backup(settings, engine, ManualClock()).parts()))
    engine.dispose()
    return archive


def rows_of(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    engine = open_own_database(settings)
    with reading(engine) as connection:
        found = {
            table.name: sorted((dict(row._mapping) for row in connection.execute(sa.select(table))), key=repr)
            for table in reflected(connection).sorted_tables
        }
    engine.dispose()
    return found


def members_of(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize("source", ENGINES)
@pytest.mark.parametrize("target", ENGINES)
def test_a_backup_of_one_engine_goes_into_the_other(source: str, target: str, new_home: NewHome) -> None:
    old, new = new_home(source), new_home(target)
    fill(old)
    before = rows_of(old)
    answer = restore(new, back_up(old), ManualClock())
    assert (answer["projects"], answer["models"], answer["unfinished"]) == (4, 2, 2)
    after = rows_of(new)
    for table in ("users", "tokens", "audit", "rounds"):
        assert after[table] == before[table]
    (restored,) = [row for row in after["projects"] if row["id"] == FINISHED]
    (expected,) = [row for row in before["projects"] if row["id"] == FINISHED]
    assert restored == expected | {"training": expected["training"] | {"restored": True}}
    steps = {row["name"] for row in after["steps"] if row["project"] == FINISHED}
    assert steps == {"data"}
    engine = open_own_database(new)
    store = Store(engine)
    states = {row.id: (row.state, row.cleaned) for row in store.projects()}
    assert states == {
        FINISHED: (State.FINISHED, True),
        TRAINING: (State.FAILED, True),
        STOPPED: (State.STOPPED, True),
        PAUSED: (State.FAILED, True),
    }
    assert store.unsettled() == []
    reason = store.project(TRAINING).reason
    assert reason is not None
    assert reason.endswith("found it training - start it anew with 'flops retry p-trai'")
    assert store.events(TRAINING)[-1].data["state"] == "failed"
    assert store.model("mnist", 1).folder == str(models_dir(new) / "mnist" / "1")
    assert store.model("mnist", 2).folder is None
    kept = {str(path.relative_to(models_dir(new))) for path in models_dir(new).rglob("*") if path.is_file()}
    assert kept == {"mnist/1/model/MLmodel", "mnist/1/parameters.safetensors", f"mnist/1/{ODD_NAME}"}
    config = ProjectPaths.of(new, TRAINING).config
    assert json.loads((config / "spec.json").read_text()) == {"key": TRAINING}
    assert (config.stat().st_mode & 0o777, (config / "spec.json").stat().st_mode & 0o777) == (0o700, 0o600)
    assert [one.stopped for one in store.deployments()] == [True]
    assert AuditLog(engine, ManualClock()).verify().entries == 1
    store.retry(TRAINING)
    assert store.steps(TRAINING) == {}
    store.start_step(TRAINING, "data")
    store.finish_step(TRAINING, "data", {}, learners=[Learner(LearnerId("learner-1"), 1, "a")])
    assert store.accept_reports(TRAINING, "aggregator", [Report(1, 1.0, EventKind.WARNING, {})]) == 1
    assert store.events(TRAINING)[-1].kind is EventKind.WARNING
    store.close()


def test_a_backup_of_a_restored_home_is_the_same_again(new_home: NewHome) -> None:
    old, between, new = new_home("sqlite"), new_home("postgresql"), new_home("sqlite")
    fill(old)
    restore(between, back_up(old), ManualClock())
    restore(new, back_up(between), ManualClock())
    first, second = members_of(back_up(between)), members_of(back_up(new))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {"manifest.json", "sha256.json"}


def test_a_backup_of_an_older_version_is_brought_up_to_date(new_home: NewHome, tmp_path: Path) -> None:
    old = new_home("sqlite")
    fill(old)
    members = members_of(back_up(old))
    newer = (
        "users",
        "tokens",
        "accounts",
        "audit",
        "answers",
        "join_tokens",
        "joined_nodes",
        "node_services",
        "sites",
    )
    for table in newer:
        del members[f"tables/{table}.jsonl"]
    for table in ("projects", "models"):
        lines = [json.loads(line) for line in members[f"tables/{table}.jsonl"].splitlines()]
        for line in lines:
            del line["owner"], line["team"]
            line.pop("request", None)
        members[f"tables/{table}.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    manifest = json.loads(members["manifest.json"])
    manifest["revision"] = "0003"
    for table in newer:
        del manifest["rows"][table]
    members["manifest.json"] = json.dumps(manifest).encode()
    new = new_home("postgresql")
    restore(new, forged(tmp_path, members), ManualClock())
    for table in ("projects", "models"):
        assert {row["owner"] for row in rows_of(new)[table]} == {"admin"}


def test_rows_are_of_one_moment_while_the_manager_works(new_home: NewHome) -> None:
    settings = new_home("postgresql")
    fill(settings)
    engine = open_own_database(settings)
    store = Store(engine)
    backup = Backup(settings, engine, ManualClock())
    store.add_event(TRAINING, EventKind.WARNING, {"message": "later"})
    archive = settings.home.with_suffix(".tar")
    archive.write_bytes(b"".join(backup.parts()))
    store.close()
    assert b"later" not in members_of(archive)["tables/events.jsonl"]


def test_a_home_with_projects_or_a_manager_is_not_overwritten(new_home: NewHome) -> None:
    old, new = new_home("sqlite"), new_home("sqlite")
    fill(old)
    archive = back_up(old)
    before = rows_of(old)
    with pytest.raises(ConflictError, match="holds 4 projects and 2 models"):
        restore(old, archive)
    assert rows_of(old) == before
    claimed = claim_home(new)
    with pytest.raises(ConflictError, match="another manager"):
        restore(new, archive)
    claimed.leave()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_restore_that_fails_leaves_the_home_empty_and_can_be_repeated(
    engine: str, new_home: NewHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = new_home("sqlite"), new_home(engine)
    fill(old)
    archive = back_up(old)
    move = restoring._move

    def move_and_fail(*arguments: Any) -> None:
        move(*arguments)
        raise OSError("the disk is gone")

    monkeypatch.setattr(restoring, "_move", move_and_fail)
    with pytest.raises(Exception, match="the disk is gone - nothing was changed"):
        restore(new, archive)
    assert rows_of(new)["projects"] == []
    left = [path for path in new.home.rglob("*") if path.is_file() and path.parent != new.home]
    assert left == []
    monkeypatch.undo()
    leftover = ProjectPaths.of(new, FINISHED).config  # of a restore that was killed
    write_private(leftover / "old.json", "{}")
    assert restore(new, archive)["projects"] == 4
    assert not (leftover / "old.json").exists()


# archives of others


def forged(folder: Path, members: dict[str, bytes], *, extra: Any = None) -> Path:
    """An archive with right sums, so that only its content speaks against it."""
    members = {name: content for name, content in members.items() if name != "sha256.json"}
    made = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    members["sha256.json"] = json.dumps(made).encode()
    archive = folder / "forged.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        if extra is not None:
            tar.addfile(extra)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return archive


@pytest.fixture
def members(new_home: NewHome) -> dict[str, bytes]:
    settings = new_home("sqlite")
    fill(settings)
    return members_of(back_up(settings))


def refuses(settings: Settings, archive: Path, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        restore(settings, archive)
    assert not any((settings.home / name).exists() for name in ("projects", "models"))
    assert rows_of(settings)["projects"] == []
    assert not list(settings.home.glob(".restore-*"))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/cron.d/evil",
        "../evil",
        "files/projects/p-fini/config/../../../../evil",
        "files/projects/../config/evil",
        "files/projects/p-fini/checkout/evil",
        "files/models/../1/evil",
        "files/token",
        "tables/../manifest.json",
        "files/models/mnist/1/",
        "evil",
    ],
)
def test_members_with_other_names_are_refused(
    name: str, members: dict[str, bytes], new_home: NewHome, tmp_path: Path
) -> None:
    refuses(new_home("sqlite"), forged(tmp_path, members | {name: b"x"}), "is no whole backup of FLOps")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_anything_but_plain_files_is_refused(
    kind: bytes, members: dict[str, bytes], new_home: NewHome, tmp_path: Path
) -> None:
    link = tarfile.TarInfo("files/models/mnist/1/link")
    link.type, link.linkname = kind, "/etc/passwd"
    refuses(new_home("sqlite"), forged(tmp_path, members, extra=link), "is no plain file")


def test_a_cut_or_changed_archive_is_refused(
    members: dict[str, bytes], new_home: NewHome, tmp_path: Path
) -> None:
    archive = forged(tmp_path, members)
    whole = archive.read_bytes()
    for length in (0, 100, len(whole) // 2, whole.rindex(b"sha256.json")):
        archive.write_bytes(whole[:length])
        refuses(new_home("sqlite"), archive, "is no whole backup of FLOps")
    archive.write_bytes(whole.replace(b"1" * 5000, b"1" * 4999 + b"2"))
    refuses(new_home("sqlite"), archive, "parameters.safetensors' is damaged")


def test_a_header_that_claims_gigabytes_is_refused(new_home: NewHome, tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    archive = tmp_path / "huge.tar"
    archive.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    refuses(new_home("sqlite"), archive, "a header is too large")


def _changed(members: dict[str, bytes], table: str, **values: Any) -> dict[str, bytes]:
    name = f"tables/{table}.jsonl"
    first, *others = members[name].splitlines(keepends=True)
    line = json.loads(first) | values
    return members | {name: json.dumps(line).encode() + b"\n" + b"".join(others)}


@pytest.mark.parametrize(
    ("table", "values", "match"),
    [
        ("projects", {"id": "../evil"}, "do not fit together|is not a project id"),
        ("projects", {"name": 7}, "projects.name has a value of another type"),
        ("projects", {"name": "n" * 201}, "projects.name has a value of another type"),
        ("projects", {"cleaned": 1}, "projects.cleaned has a value of another type"),
        ("projects", {"last_seq": 1 << 70}, "projects.last_seq has a value of another type"),
        ("projects", {"state": None}, "projects.state has a value of another type"),
        ("projects", {"reason": "\ud800"}, "do not fit together"),
        ("projects", {"more": 1}, "a row of projects has other columns"),
        ("projects", {"created": float("nan")}, "which is no JSON"),
        ("models", {"folder": "/etc"}, "the files of model mnist version 1 are missing"),
        ("models", {"folder": "models/mnist/2"}, "the files of model mnist version 1 are missing"),
        ("models", {"name": "../x"}, "is no version of a model"),
        ("events", {"project": "p-none"}, "do not fit together"),
    ],
)
def test_rows_that_cannot_be_ours_are_refused(
    table: str,
    values: dict[str, Any],
    match: str,
    members: dict[str, bytes],
    new_home: NewHome,
    tmp_path: Path,
) -> None:
    refuses(new_home("sqlite"), forged(tmp_path, _changed(members, table, **values)), match)


def test_what_a_newer_version_wrote_is_refused_by_name(
    members: dict[str, bytes], new_home: NewHome, tmp_path: Path
) -> None:
    manifest = json.loads(members["manifest.json"]) | {"revision": "9999", "flops": "7.0"}
    members["manifest.json"] = json.dumps(manifest).encode()
    refuses(new_home("sqlite"), forged(tmp_path, members), "was made by FLOps 7.0, which is newer")
