"""Signing in with an issuer over the REST API, and with the command line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flops.core.clock import SystemClock
from tests.api.conftest import ManagerProcess
from tests.issuers import FakeIssuer


@pytest.fixture(scope="module")
def issuer() -> Iterator[FakeIssuer]:
    issuer = FakeIssuer(SystemClock())
    yield issuer
    issuer.close()


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory, issuer: FakeIssuer) -> Iterator[ManagerProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOPS_OIDC_ISSUER", issuer.url)
        patch.setenv("FLOPS_OIDC_CLIENT_ID", "flops")
        patch.setenv("FLOPS_OIDC_ROLES", "ml=engineer,cn=ops=admin")
        manager = ManagerProcess(tmp_path_factory.mktemp("api") / "home").start()
    yield manager
    manager.end()


@pytest.fixture
def anybody(manager: ManagerProcess, issuer: FakeIssuer) -> httpx.Client:
    issuer.claims = {"sub": "7", "email": "ann@example.org", "email_verified": True, "groups": ["ml"]}
    return manager.client("")


def back(manager: ManagerProcess) -> str:
    return f"{manager.url}/login/oidc"


def begin(client: httpx.Client, redirect_uri: str) -> dict[str, str]:
    answer = client.post("/v1/oidc/begin", json={"redirect_uri": redirect_uri})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_sign_in_gives_a_token_and_stands_in_the_audit_log(
    manager: ManagerProcess, anybody: httpx.Client, issuer: FakeIssuer, client: httpx.Client
) -> None:
    assert anybody.get("/v1/oidc").json() == {"issuer": "127.0.0.1"}
    begun = begin(anybody, back(manager))
    code = issuer.come_back(begun["url"])
    finish = {"state": begun["state"], "secret": begun["secret"], "code": code, "iss": issuer.url}
    made = anybody.post("/v1/oidc/finish", json=finish).raise_for_status().json()
    assert (made["user"], made["role"]) == ("ann@example.org", "engineer")
    assert made["expires"] == pytest.approx(time.time() + 12 * 3600, abs=60)
    person = manager.client(made["token"])
    said = person.get("/v1/me").json()
    assert (said["user"], said["token"], said["signed_in"]) == ("ann@example.org", made["id"], True)
    assert person.get("/v1/users").status_code == 403
    (user,) = [one for one in client.get("/v1/users").json()["users"] if one["name"] == "ann@example.org"]
    assert user["issuer"] == issuer.url
    entry = client.get("/v1/audit", params={"newest": True, "user": "ann@example.org"}).json()["entries"][-1]
    assert (entry["action"], entry["token"], entry["outcome"]) == ("POST /v1/oidc/finish", made["id"], 200)
    assert entry["object"] == "sign-in of ann@example.org, subject 7"
    # once is enough, for everybody
    again = anybody.post("/v1/oidc/finish", json=finish)
    assert (again.status_code, again.json()["code"]) == (401, "unauthorized")
    assert person.delete(f"/v1/tokens/{made['id']}").status_code == 200
    assert person.get("/v1/me").status_code == 401
    told = json.dumps(client.get("/v1/audit").json()) + manager.log
    for secret in (made["token"], begun["secret"], code):
        assert secret not in told


@pytest.mark.parametrize(
    "place",
    [
        "https://evil.example/login/oidc",
        "http://evil.example/login/oidc",
        "http://127.0.0.1:4711/elsewhere",
        "http://127.0.0.1:4711/login/oidc?x=1",
        "http://127.0.0.1:4711/login/oidc#x",
        "http://127.0.0.1@evil.example:80/login/oidc",
        "http://127.0.0.1.evil.example:80/login/oidc",
        "http://127.0.0.1:99999/login/oidc",
        "http://127.0.0.1/login/oidc",
        "https://127.0.0.1:4711/login/oidc",
        "javascript:alert(1)",
        "/login/oidc",
    ],
)
def test_codes_are_sent_to_nobody_else(anybody: httpx.Client, place: str) -> None:
    answer = anybody.post("/v1/oidc/begin", json={"redirect_uri": place})
    assert answer.status_code == 422
    assert "is no place to come back to" in answer.json()["detail"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_programs_of_the_person_are_come_back_to(anybody: httpx.Client, host: str) -> None:
    assert begin(anybody, f"http://{host}:4711/login/oidc")["url"]


def test_who_has_no_role_is_told_so_and_noted(
    manager: ManagerProcess, anybody: httpx.Client, issuer: FakeIssuer, client: httpx.Client
) -> None:
    issuer.claims |= {"sub": "9", "email": "eve@example.org", "groups": []}
    begun = begin(anybody, back(manager))
    finish = {"state": begun["state"], "secret": begun["secret"], "code": issuer.come_back(begun["url"])}
    answer = anybody.post("/v1/oidc/finish", json=finish)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "nobody has added eve@example.org here" in answer.json()["detail"]
    entry = client.get("/v1/audit", params={"newest": True}).json()["entries"][0]
    assert (entry["user"], entry["outcome"]) == ("", 403)
    assert entry["object"].startswith("sign-in of eve@example.org, subject 9: nobody has added")


def test_where_the_issuer_is_away_tokens_are_as_good_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOPS_OIDC_ISSUER", "http://127.0.0.1:1/nobody")
    monkeypatch.setenv("FLOPS_OIDC_CLIENT_ID", "flops")
    manager = ManagerProcess(tmp_path / "home").start()
    try:
        anybody = manager.client("")
        answer = anybody.post("/v1/oidc/begin", json={"redirect_uri": back(manager)})
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert "the issuer at 127.0.0.1 cannot be reached" in answer.json()["detail"]
        page = anybody.post("/login/oidc", data={"next": "/models"})
        assert page.status_code == 503
        assert "cannot be reached" in page.text
        assert "Sign in with 127.0.0.1" in page.text
        assert manager.client().get("/v1/me").json()["role"] == "admin"
    finally:
        manager.end()


def test_a_manager_does_not_start_with_half_an_issuer(tmp_path: Path) -> None:
    given = {"ISSUER": "https://sso.example.org", "CLIENT_ID": "flops", "ROLES": "a=king"}
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "flops.manager", "--home", str(tmp_path / "home")],
        env=os.environ | {f"FLOPS_OIDC_{name}": value for name, value in given.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("FLOPS_OIDC_ROLES gives the role 'king' - use one of")


class Terminal:
    """Somebody's command line, on a FLOPS_HOME of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flops.cli", *arguments],
            env=os.environ | {"FLOPS_HOME": str(self.home), "BROWSER": "/bin/true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _address_told(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().startswith("http"):
            return line.strip()
    raise AssertionError("no address was told")


@pytest.mark.parametrize("pasted", [False, True])
def test_the_command_line_signs_in_with_a_browser_and_out_again(
    manager: ManagerProcess, anybody: httpx.Client, issuer: FakeIssuer, tmp_path: Path, pasted: bool
) -> None:
    terminal = Terminal(tmp_path / "person")
    with terminal.start("login", manager.url, "--sso", *(["--no-browser"] if pasted else [])) as process:
        url = httpx.URL(_address_told(process))
        code = issuer.come_back(str(url))
        end = httpx.URL(url.params["redirect_uri"]).copy_merge_params(
            {"code": code, "state": url.params["state"]}
        )
        wrong = end.copy_merge_params({"state": "another", "code": "another"})
        if pasted:
            assert process.stdin is not None
            process.stdin.write(f"nonsense\n{wrong}\n{end}\n")
            process.stdin.flush()
        else:
            with httpx.Client(trust_env=False, timeout=60) as browser:
                assert browser.get(wrong.copy_with(path="/elsewhere")).status_code == 404
                browser.get(wrong)
                assert "Go back to the terminal" in browser.get(end).text
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.strip() == f"signed in at {manager.url} as ann@example.org (engineer)"
    kept = json.loads((terminal.home / "login.json").read_text())
    assert (terminal.home / "login.json").stat().st_mode & 0o777 == 0o600
    assert kept["token"] not in out + err
    assert "ann@example.org (engineer" in terminal.run("whoami").stdout
    assert terminal.run("logout").stdout.strip() == "signed out"
    assert manager.client(kept["token"]).get("/v1/me").status_code == 401


def test_who_says_no_at_the_issuer_is_not_signed_in(
    manager: ManagerProcess, anybody: httpx.Client, tmp_path: Path
) -> None:
    terminal = Terminal(tmp_path / "person")
    with terminal.start("login", manager.url, "--sso") as process:
        url = httpx.URL(_address_told(process))
        denied = {"error": "access_denied", "state": url.params["state"]}
        httpx.get(httpx.URL(url.params["redirect_uri"]).copy_merge_params(denied), trust_env=False)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "not signed in: the issuer says 'access_denied'" in err
    assert not (terminal.home / "login.json").exists()


def test_who_tries_again_and_again_has_to_wait(anybody: httpx.Client) -> None:
    """The last one: it shuts this address out for a while."""
    statuses = [
        anybody.post("/v1/oidc/finish", json={"state": "x", "secret": "y", "code": "z"}).status_code
        for _ in range(12)
    ]
    assert statuses[0] == 401
    assert statuses[-1] == 429
