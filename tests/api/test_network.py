"""The REST API for other machines: over TLS, under the manager's own authority."""

import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import ManagerProcess

HOST = "127.0.0.2"
"""This machine's, and not where managers listen otherwise."""


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[ManagerProcess]:
    manager = ManagerProcess(tmp_path_factory.mktemp("api") / "home", "--listen", f"{HOST}:{port}").start()
    yield manager
    manager.end()


@pytest.fixture
def url(shared: ManagerProcess, port: int) -> str:
    return f"https://{HOST}:{port}"


@pytest.fixture
def authority(url: str) -> ssl.SSLContext:
    """What somebody trusts who asked for the authority and compared its fingerprint."""
    told = httpx.get(f"{url}/v1/authority", verify=False, trust_env=False).text
    return ssl.create_default_context(cadata=told)


def test_whoever_trusts_the_authority_comes_in_with_a_token(
    shared: ManagerProcess, url: str, authority: ssl.SSLContext
) -> None:
    with httpx.Client(base_url=url, verify=authority, trust_env=False) as client:
        assert client.get("/v1/health").json()["pid"] == shared.process.pid
        assert client.get("/v1/me").status_code == 401
        bearer = {"Authorization": f"Bearer {shared.token}"}
        assert client.get("/v1/me", headers=bearer).json()["user"] == "admin"
        wrong = client.get("/v1/me", headers={**bearer, "Host": "evil.example"})
        assert wrong.status_code == 421


def test_nobody_is_answered_without_tls_or_trust(url: str) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{url}/v1/health", trust_env=False)
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http") + "/v1/health", trust_env=False)


def test_a_manager_of_this_machine_alone_has_no_authority(manager: ManagerProcess) -> None:
    answer = manager.client("").get("/v1/authority")
    assert (answer.status_code, answer.json()["code"]) == (404, "not-found")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("203.0.113.7:9", "cannot listen on 203.0.113.7:9 .* - choose another address"),
        ("127.0.0.2:none", "'127.0.0.2:none' is no address to listen on"),
    ],
)
def test_an_impossible_address_is_named(tmp_path: Path, place: str, message: str) -> None:
    command = [sys.executable, "-P", "-m", "flops.manager", "--home", str(tmp_path / "home")]
    ended = subprocess.run([*command, "--listen", place], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert re.search(message, ended.stderr)
