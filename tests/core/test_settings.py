from pathlib import Path

from flops.core.settings import Settings

LONGEST_SOCKET_PATH = 107


def test_home_comes_from_the_environment_and_is_absolute() -> None:
    settings = Settings.from_environment({"FLOPS_HOME": "somewhere", "FLOPS_PORT": "8123"})
    assert settings.home == Path.cwd() / "somewhere"
    assert settings.port == 8123


def test_home_is_in_the_users_folder_where_nothing_is_set() -> None:
    assert Settings.from_environment({}).home == Path.home() / ".flops"


def test_everything_is_stored_below_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for place in (
        settings.database,
        settings.lock_file,
        settings.address_file,
        settings.token_file,
        settings.projects_dir,
        settings.environments_dir,
        settings.locks_dir,
        settings.datasets_dir,
        settings.data_dir,
        settings.spool_dir,
        settings.services_dir,
        settings.logs_dir,
        settings.mlflow_artifacts_dir,
    ):
        assert place.is_relative_to(tmp_path)


def test_tracking_is_local_unless_a_uri_is_configured(tmp_path: Path) -> None:
    assert Settings(tmp_path).mlflow_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert Settings(tmp_path, tracking_uri="http://mlflow:5000").mlflow_uri == "http://mlflow:5000"


def test_sockets_fit_however_deep_home_is() -> None:
    deep = Settings(home=Path("/" + "/".join(["deep" * 10] * 6)))
    assert len(str(deep.manager_socket)) <= LONGEST_SOCKET_PATH
    assert not deep.run_dir.is_relative_to(deep.home)
    assert deep.run_dir != Settings(home=deep.home / "other").run_dir
    shallow = Settings(home=Path("/srv/flops"))
    assert shallow.data_socket == Path("/srv/flops/run/data.sock")
