"""Who may use a FLOPS_HOME beside whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from flops.core.errors import ConflictError
from flops.core.settings import Settings
from flops.manager.home import claim_home
from flops.manager.paths import ProjectPaths
from flops.persistence import lease_of, open_database, writing
from tests.manager.conftest import PROJECT
from tests.postgres import PostgresServer

ONE = "postgresql://flops@127.0.0.1:1/one"
OTHER = "postgresql://flops@127.0.0.1:1/other"


def test_managers_of_one_postgresql_share_a_home_that_no_other_gets(tmp_path: Path) -> None:
    on_server = Settings(home=tmp_path, database_url=ONE)
    first, second = claim_home(on_server, shared=True), claim_home(on_server, shared=True)
    with pytest.raises(ConflictError, match=f"already uses {tmp_path}"):
        claim_home(Settings(home=tmp_path))
    with pytest.raises(ConflictError, match="another manager already uses"):
        claim_home(Settings(home=tmp_path, database_url=OTHER), shared=True)
    first.leave()
    second.leave()
    alone = claim_home(Settings(home=tmp_path))
    with pytest.raises(ConflictError, match="already uses"):
        claim_home(on_server, shared=True)
    alone.leave()


def test_a_home_that_holds_projects_of_another_database_is_not_shared(tmp_path: Path) -> None:
    on_server = Settings(home=tmp_path, database_url=ONE)
    claim_home(on_server, shared=True).leave()
    ProjectPaths.of(on_server, PROJECT).config.mkdir(parents=True)
    with pytest.raises(ConflictError, match=r"not in 127\.0\.0\.1:1/other"):
        claim_home(Settings(home=tmp_path, database_url=OTHER), shared=True)


def test_who_leaves_a_shared_home_takes_nobody_elses_address_along(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, database_url=ONE)
    leaving = claim_home(settings, shared=True)
    settings.address_file.write_text('{"url": "http://127.0.0.1:1", "pid": 1}')
    leaving.leave()
    assert settings.address_file.exists()


def test_nobody_stands_by_for_a_manager_on_sqlite(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flops.manager", "--home", str(tmp_path / "home"), "--standby"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("a manager on SQLite has nobody to stand by for it - name a PostgreSQL")
    assert not (tmp_path / "home").exists()


def test_nobody_stands_by_for_services_of_another_machine(tmp_path: Path, postgres: PostgresServer) -> None:
    url = postgres.database()
    engine = open_database(url, alone=True)
    lease = lease_of(engine)
    assert lease is not None
    try:
        with lease._turn, writing(engine) as connection:  # no renewal meanwhile
            elsewhere = {"pid": 1, "started": "1", "host": "elsewhere", "boot": "another", "space": "pid:[1]"}
            change = "UPDATE manager_lease SET process = :process, place = 'pid 1 on elsewhere'"
            connection.execute(sa.text(change), {"process": json.dumps(elsewhere)})
        command = [sys.executable, "-m", "flops.manager", "--home", str(tmp_path / "home"), "--standby"]
        environment = {**os.environ, "FLOPS_DATABASE": url}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert ended.returncode == 1
        assert "pid 1 on elsewhere runs its services as processes of its machine" in ended.stderr
    finally:
        engine.dispose()
