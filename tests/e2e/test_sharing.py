"""A team on one manager: they sign in over TLS, run their own projects, and do not see each other's."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]

User = Any
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist-sklearn"
HOST = "127.0.0.3"
"""This machine's, and not where managers listen otherwise."""


@pytest.fixture(scope="module")
def operator(make_user: Callable[..., User]) -> Iterator[User]:
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    person = make_user(FLOPS_LISTEN=f"{HOST}:{port}")
    person.url = f"https://{HOST}:{port}"
    started = person.flops("up", "--json").document
    assert re.fullmatch("flops_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", started["admin_token"])
    person.fingerprint = started["fingerprint"]
    assert "admin_token" not in person.flops("up", "--json").document, "it is shown once"
    yield person
    assert person.flops("down", "--force").code == 0


@pytest.fixture(scope="module")
def sign_in(operator: User, make_user: Callable[..., User]) -> Callable[..., User]:
    def make(name: str, role: str) -> User:
        assert operator.flops("user", "add", name, "--role", role).code == 0
        made = operator.flops("token", "create", "laptop", "--user", name, "--for", "1h", "--json")
        person = make_user(FLOPS_TOKEN=made.document["token"])
        ended = person.flops("login", operator.url, "--fingerprint", operator.fingerprint, "--json")
        assert ended.code == 0, ended.stderr
        del person.environment["FLOPS_TOKEN"]
        person.number = made.document["id"]
        return person

    return make


def test_a_team_shares_a_manager(operator: User, sign_in: Callable[..., User]) -> None:
    ann, bob, eve = sign_in("ann", "engineer"), sign_in("bob", "engineer"), sign_in("eve", "auditor")
    assert ann.flops("whoami", "--json").document["url"] == operator.url
    project = ann.project(str(EXAMPLE), "--mock", "digits", "--learners", "2", "--rounds", "2")
    assert (project["state"], project["owner"]) == ("finished", "ann")

    assert bob.flops("ls", "--json").document == []
    hidden = bob.flops("show", project["id"])
    assert hidden.code == 1
    assert f"there is no project {project['id']}" in hidden.stderr
    assert [one["id"] for one in eve.flops("ls", "--json").document] == [project["id"]]
    refused = eve.flops("rm", project["id"])
    assert "eve (auditor) may not DELETE" in refused.stderr

    log = eve.flops("audit", "ls", "--user", "ann", "--json").document
    assert ("POST /v1/projects", 201) in [(entry["action"], entry["outcome"]) for entry in log]
    assert project["id"] in json.dumps(log)
    assert eve.flops("audit", "verify").code == 0

    assert operator.flops("token", "revoke", bob.number).code == 0
    assert "revoked or expired" in bob.flops("ls").stderr
    assert operator.flops("user", "set", "ann", "--disable").code == 0
    assert "revoked or expired" in ann.flops("ls").stderr


def test_whoever_is_signed_in_elsewhere_does_not_stop_that_manager(
    operator: User, sign_in: Callable[..., User]
) -> None:
    root = sign_in("root", "admin")
    assert root.flops("down", "--json").document == {"was_running": False}
    assert root.flops("logout").code == 0
    assert root.flops("ls", "--json").document == []  # of a manager of its own
    assert root.flops("down").code == 0
    assert operator.flops("whoami", "--json").document["user"] == "admin"


def test_another_managers_fingerprint_is_not_taken(operator: User, make_user: Callable[..., User]) -> None:
    person = make_user(FLOPS_TOKEN="x")
    wrong = person.flops("login", operator.url, "--fingerprint", "AB:CD")
    assert wrong.code == 1
    assert "not the one that was given" in wrong.stderr
    plain = person.flops("login", "http://192.0.2.1:80")
    assert "would send the token in the clear" in plain.stderr
    assert not (person.home / "login.json").exists()
