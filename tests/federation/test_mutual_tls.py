"""Mutual TLS of an aggregator and its members: a stranger to the project does not get as far as a token."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest

from flops.federation.channels import Channels
from flops.federation.config import Member, Tls
from flops.federation.hub import Hub, Server
from flops.manager.authority import Authority
from flops_worker.tensors import Layout

TOKEN = "t"


class Project:
    """One project's authority, and what it issues."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder, f"FLOps authority of {folder.name}")
        self.ca = str(self.authority.certificate_file)

    def tls(self, name: str, *hosts: str, client: bool = True, days: float = 1) -> Tls:
        issued = self.authority.issue(name, hosts, client=client, days=days)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_text(issued.certificate)
        key.write_text(issued.key)
        return Tls(str(cert), str(key), self.ca)


@pytest.fixture
def ours(tmp_path: Path) -> Project:
    return Project(tmp_path / "p-ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Project:
    return Project(tmp_path / "p-theirs")


def serve(tls: Tls) -> Server:
    hub = Hub("p", Layout.of([np.zeros(2, np.float32)]), {"a": Member(TOKEN)})
    return Server("grpc+tls://127.0.0.1:0", hub, tls)


@pytest.fixture
def aggregator(ours: Project) -> Iterator[Server]:
    server = serve(ours.tls("aggregator", "127.0.0.1"))
    yield server
    server.shutdown()


def call(server: Server, tls: Tls, token: str = TOKEN) -> None:
    """Whoever comes in is told that this is no service of an aggregator: NotImplementedError."""
    client: Any = Channels().take(f"grpc+tls://127.0.0.1:{server.port}", tls)
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {token}".encode())], timeout=20.0)
    with closing(client):
        list(client.list_flights(options=options))


def test_a_member_of_the_project_comes_in(ours: Project, aggregator: Server) -> None:
    with pytest.raises(NotImplementedError):
        call(aggregator, ours.tls("agent-1"))


@pytest.mark.parametrize("proof", ["none", "theirs", "theirs-with-our-name", "expired", "key-of-another"])
def test_whoever_cannot_prove_it_does_not_come_in_with_the_right_token(
    ours: Project, theirs: Project, aggregator: Server, proof: str
) -> None:
    tls = {
        "none": lambda: Tls(ca=ours.ca),
        "theirs": lambda: Tls(*_files(theirs.tls("agent-1")), ours.ca),
        "theirs-with-our-name": lambda: Tls(*_files(theirs.tls("aggregator", "127.0.0.1")), ours.ca),
        "expired": lambda: ours.tls("agent-1", days=-0.02),
        "key-of-another": lambda: Tls(ours.tls("agent-1").cert, ours.tls("agent-2").key, ours.ca),
    }[proof]()
    with pytest.raises(flight.FlightUnavailableError):
        call(aggregator, tls)


def test_a_certificate_alone_is_not_enough(ours: Project, aggregator: Server) -> None:
    with pytest.raises(flight.FlightUnauthenticatedError):
        call(aggregator, ours.tls("agent-1"), "another")


def test_a_learner_cannot_pass_for_an_aggregator(ours: Project) -> None:
    """Its certificate names no address, and is good for clients only."""
    impostor = serve(ours.tls("agent-1"))
    with pytest.raises(flight.FlightUnavailableError):
        call(impostor, ours.tls("agent-2"))
    impostor.shutdown()


def test_another_projects_aggregator_is_not_trusted(ours: Project, theirs: Project) -> None:
    server = serve(theirs.tls("aggregator", "127.0.0.1"))
    with pytest.raises(flight.FlightUnavailableError):
        call(server, ours.tls("agent-1"))
    server.shutdown()


def _files(tls: Tls) -> tuple[str | None, str | None]:
    return tls.cert, tls.key
