from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from flops.core.errors import InvalidInputError
from flops.tracking import AUDIENCES_HEADER, GUI_SOCKET, SECRET_HEADER, gui_command
from flops.tracking.naming import is_of, shared_names
from flops.tracking.visibility import audiences_of

if TYPE_CHECKING:
    from tests.tracking.conftest import Home


@contextmanager
def behind(folder: Path, **headers: str) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(folder / GUI_SOCKET), retries=0)
    with httpx.Client(
        transport=transport, base_url="http://localhost/mlflow", headers=headers, timeout=60.0
    ) as client:
        yield client


@pytest.mark.slow
def test_mlflow_answers_whoever_brings_the_secret_and_ends_when_nobody_asks(
    home: "Home", tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("g")
    secret_file = folder / "secret"
    secret_file.write_text("sesame\n")
    stale = folder / "permissions.db"
    stale.write_text("of an earlier one")
    (folder / GUI_SOCKET).touch()
    command = gui_command(home.tracking_uri, home.artifacts, folder, secret_file, idle_s=3.0)
    server = home.start(command)
    while not (folder / GUI_SOCKET).is_socket():
        assert server.poll() is None
    with behind(folder) as nobody:
        answer = nobody.get("/health")
        assert (answer.status_code, answer.text) == (403, "MLflow is behind the manager.")
    with behind(folder, **{SECRET_HEADER: "sesame", AUDIENCES_HEADER: "*"}) as reader:
        wanted = {"experiment_id": "0"}
        found = reader.get("/ajax-api/2.0/mlflow/experiments/get", params=wanted).json()
        assert found["experiment"]["name"] == "Default"
    with behind(folder, **{SECRET_HEADER: "sesame", AUDIENCES_HEADER: "user:alice"}) as stranger:
        assert stranger.get("/ajax-api/2.0/mlflow/experiments/get", params=wanted).status_code == 403
    with behind(folder, **{SECRET_HEADER: "sesame"}) as unknown:
        assert unknown.get("/ajax-api/2.0/mlflow/experiments/get", params=wanted).status_code == 401
    assert server.wait(60) == 0
    assert oct((folder / "permissions.db").stat().st_mode & 0o077) == "0o0"


def test_a_store_that_is_a_server_has_a_gui_of_its_own() -> None:
    with pytest.raises(InvalidInputError, match=r"server https://ml\.example:8443/x - open that"):
        gui_command("https://me:secret@ml.example:8443/x?token=1", "/a", Path("/b"), Path("/c"))


@pytest.mark.parametrize(
    ("text", "audiences"),
    [
        ("user:bob,team:a.b", ("team:a.b", "user:bob")),
        ("*", ("*",)),
        ("!", ("!",)),
        ("", None),
        ("user:bob,*", None),
        ("user:bob' or '1' = '1", None),
        ("user:", None),
        ("admin:x", None),
        (",".join(f"team:{number}" for number in range(61)), None),
    ],
)
def test_audiences_are_read_strictly(text: str, audiences: tuple[str, ...] | None) -> None:
    assert audiences_of(text) == audiences


def test_what_was_made_before_there_were_audiences_goes_to_the_first_admin() -> None:
    assert is_of(None, "user:admin")
    assert not is_of(None, "user:bob")
    assert not is_of("user:admin", "user:bob")
    assert not is_of("user:bob", "")


def test_names_for_different_audiences_differ() -> None:
    names = [tuple(shared_names("digits", who)) for who in ("user:bob", "team:bob", "user:admin", "")]
    assert all(first == "digits" for first, *_ in names)
    longer = [name for _, *rest in names for name in rest]
    assert len(set(longer)) == len(longer)
