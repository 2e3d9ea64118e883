"""`flops admin` against real managers: what was backed up is there again, on the other engine too."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.manager import deployment
from flops.manager.databases import open_own_database
from flops.manager.paths import write_private
from flops.manager.rows import Model
from flops.manager.states import Observation
from flops.manager.store import Store
from tests.postgres import PostgresServer

PROJECT = ProjectId("p-7k2mqd")
SPEC = spec_from_mapping({"repo": "https://ann:se-cret@example.org/mnist"})


class Shell:
    """A shell with its own FLOPS_HOME, and maybe FLOPS_DATABASE."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        database = {"FLOPS_DATABASE": settings.database_url} if settings.database_url else {}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FLOPS_")}
        self._environment: Mapping[str, str] = {**inherited, "FLOPS_HOME": str(settings.home), **database}

    def flops(self, *arguments: str, code: int = 0) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "flops.cli", *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stderr if code else ended.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.flops(*arguments, "--json"))


def fill(settings: Settings) -> None:
    """A home with a project that has finished, and its model."""
    settings.home.mkdir(parents=True)
    store = Store(open_own_database(settings))
    deployment.write_spec(settings, PROJECT, SPEC)
    spec = SPEC.to_json(redacted=True)
    store.create_project(PROJECT, name="mnist", spec=spec, source=SPEC.redacted_repo, rounds_total=2)
    for seen in (
        Observation(begun=True),
        Observation(prepared=True),
        Observation(deployed=True),
        Observation(trained=True),
        Observation(packaged=True),
    ):
        store.observe(PROJECT, seen)
    store.set_cleaned(PROJECT)
    folder = settings.home / "mlartifacts" / "m-1"
    write_private(folder / "MLmodel", "flavors: {}")
    write_private(folder / "parameters.safetensors", "parameters")
    store.add_model(Model("mnist", 1, PROJECT, 2, {"loss": 0.5}, 1.0, "models:/mnist/1", str(folder)))
    store.close()


@pytest.fixture
def shells(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Shell, Shell]]:
    """Where the backup is taken and where it goes, on the engines of the parameter."""
    urls = []
    for engine in request.param:
        server: PostgresServer | None = request.getfixturevalue("postgres") if engine == "pg" else None
        urls.append(server.database() if server is not None else None)
    pair = tuple(Shell(Settings(home=tmp_path / f"h{i}", database_url=url)) for i, url in enumerate(urls))
    fill(pair[0].settings)
    yield pair[0], pair[1]
    for shell in pair:
        shell.flops("down", "--force")


@pytest.mark.slow
@pytest.mark.parametrize("shells", [("sqlite", "pg"), ("pg", "sqlite")], indirect=True, ids=" to ".join)
def test_what_was_backed_up_is_there_in_another_home(shells: tuple[Shell, Shell], tmp_path: Path) -> None:
    old, new = shells
    backup = tmp_path / "backup.tar"
    told = old.json("admin", "backup", str(backup))
    assert told == {"file": str(backup), "size_bytes": backup.stat().st_size}
    assert backup.stat().st_mode & 0o777 == 0o600
    assert "exists already" in old.flops("admin", "backup", str(backup), code=1)
    assert "stop it with 'flops down'" in old.flops("admin", "restore", str(backup), code=1)

    answer = new.json("admin", "restore", str(backup))
    assert (answer["projects"], answer["models"], answer["unfinished"]) == (1, 1, 0)
    assert [row["id"] for row in new.json("ls")] == [PROJECT]
    assert new.json("show", PROJECT)["state"] == "finished"
    assert [(model["name"], model["version"]) for model in new.json("models")] == [("mnist", 1)]
    new.flops("model", "get", "mnist:1", "--out", str(tmp_path / "model"))
    assert (tmp_path / "model" / "parameters.safetensors").read_text() == "parameters"
    spec = deployment.read_spec(new.settings, PROJECT)
    assert spec == deployment.read_spec(old.settings, PROJECT)
    assert "was restored from a backup" in new.flops("extend", PROJECT, "--rounds", "1", code=1)
    assert "has no environment that loads its model" in new.flops("deploy", PROJECT, code=1)
    assert "1 projects and 1 models" in _refused_twice(new, backup)
    for shell in shells:
        log = (shell.settings.logs_dir / "manager.log").read_text()
        password = (shell.settings.database_url or ":").partition("@")[0].rpartition(":")[2]
        assert not password or password not in log
        assert "se-cret" not in log


def _refused_twice(shell: Shell, backup: Path) -> str:
    shell.flops("down")
    return shell.flops("admin", "restore", str(backup), code=1)


@pytest.mark.slow
@pytest.mark.parametrize("shells", [("sqlite", "sqlite")], indirect=True, ids=" to ".join)
def test_a_backup_is_for_admins_and_noted_in_the_audit_log(
    shells: tuple[Shell, Shell], tmp_path: Path
) -> None:
    shell, _ = shells
    shell.flops("user", "add", "ann", "--role", "engineer")
    token = shell.json("token", "create", "ci", "--user", "ann")["token"]
    url = json.loads(shell.settings.address_file.read_text())["url"]
    answer = httpx.post(
        f"{url}/v1/admin/backup", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    assert answer.status_code == 403
    shell.flops("admin", "backup", str(tmp_path / "backup.tar"))
    entries = shell.json("audit", "ls")
    noted = [(entry["user"], entry["outcome"]) for entry in entries if "backup" in entry["action"]]
    assert sorted(noted) == [("admin", 200), ("ann", 403)]
