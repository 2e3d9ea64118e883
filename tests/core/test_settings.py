from pathlib import Path

import pytest

from flops.core.issuer import IssuerSettings
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


def _issuer(**given: str) -> IssuerSettings | None:
    return Settings.from_environment({f"FLOPS_OIDC_{name}": value for name, value in given.items()}).issuer


def test_nobody_signs_in_elsewhere_unless_an_issuer_is_configured() -> None:
    assert _issuer() is None
    assert _issuer(ISSUER=" ") is None


def test_an_issuer_is_read_from_the_environment() -> None:
    issuer = _issuer(
        ISSUER="https://sso.example.org/realms/lab",
        CLIENT_ID="flops",
        CLIENT_SECRET_FILE="secret",
        ROLES="ml=engineer, cn=ops=admin ,",
        TEAMS="ml=vision",
    )
    assert issuer is not None
    assert (issuer.host, issuer.client_id) == ("sso.example.org", "flops")
    assert issuer.secret_file == Path.cwd() / "secret"
    assert issuer.roles == {"ml": "engineer", "cn=ops": "admin"}
    assert issuer.teams == {"ml": "vision"}
    assert (issuer.user_claim, issuer.groups_claim, issuer.newcomers) == (None, "groups", None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ISSUER": "http://sso.example.org"}, "FLOPS_OIDC_ISSUER .* in the clear - use https://"),
        ({"ISSUER": "sso.example.org"}, "is no address - use https://HOST/PATH"),
        ({"ISSUER": "https://u:p@sso.example.org"}, "is no address"),
        ({"ISSUER": "https://[sso"}, "is no address"),
        ({"ISSUER": "https://sso.example.org/#x"}, "is no address"),
        ({"ISSUER": "https://sso.example.org"}, "FLOPS_OIDC_CLIENT_ID is not set"),
        (
            {"CLIENT_ID": "flops"},
            "FLOPS_OIDC_CLIENT_ID is set, and FLOPS_OIDC_ISSUER is not - name the issuer",
        ),
        (
            {"ISSUER": "https://h", "CLIENT_ID": "f", "SCOPES": "email"},
            "FLOPS_OIDC_SCOPES is 'email' - 'openid' must be one of them",
        ),
        (
            {"ISSUER": "https://h", "CLIENT_ID": "f", "ROLES": "admin"},
            "FLOPS_OIDC_ROLES holds 'admin' - use GROUP",
        ),
        ({"ISSUER": "https://h", "CLIENT_ID": "f", "TEAMS": "=a"}, "FLOPS_OIDC_TEAMS holds '=a' - use GROUP"),
    ],
)
def test_half_an_issuer_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _issuer(**given)
