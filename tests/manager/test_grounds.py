"""What services on nodes are given to prove themselves with, and when they need it anew."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from cryptography import x509

from flops.core.ids import LearnerId, ProjectId, ServiceName
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.manager.authority import Authority
from flops.manager.grounds import AGENT, ImageGround, config_file
from flops.manager.paths import write_private
from flops.manager.ports import Ports
from flops.manager.rows import Learner, Service
from flops.orchestration import FakeOrchestrator, ServiceSpec

PROJECT = ProjectId("p-7k2mqd")
SPEC = spec_from_mapping({"repo": "/somewhere/mnist"})
NAME = ServiceName(f"{PROJECT}-agent-1")
SERVICE = Service(NAME, AGENT, LearnerId("learner-1"))
LEARNERS = {"learner-1": Learner(LearnerId("learner-1"), 1, "a")}
RESULTS = {"images": {"runtime": "runtime", "learner": "learner"}}


@pytest.fixture
def ground(settings: Settings) -> ImageGround:
    config = config_file(settings, PROJECT, "learner-1")
    config.parent.mkdir(parents=True)
    write_private(config, "{}")
    authority = Authority(settings.authority_dir)
    ports = Ports(settings.home / "ports.json")
    return ImageGround(settings, FakeOrchestrator(), authority, ports, "https://127.0.0.1:1")


def _certificate(spec: ServiceSpec) -> x509.Certificate:
    (pem,) = [
        file.content
        for file in spec.files
        if file.content.startswith(b"-----BEGIN CERT") and "ca" not in file.name
    ]
    return x509.load_pem_x509_certificate(pem)


def test_a_service_gets_a_new_certificate_where_little_is_left_of_its_old_one(
    settings: Settings, ground: ImageGround
) -> None:
    first = ground.specification(PROJECT, SPEC, SERVICE, LEARNERS, RESULTS)
    assert ground.specification(PROJECT, SPEC, SERVICE, LEARNERS, RESULTS) == first
    assert not ground.needs_certificate(PROJECT, SERVICE)
    assert not ground.needs_certificate(PROJECT, replace(SERVICE, name=ServiceName(f"{PROJECT}-worker-1"))), (
        "it has none"
    )
    _age(settings, days=9)
    assert ground.needs_certificate(PROJECT, SERVICE)
    second = ground.specification(PROJECT, SPEC, SERVICE, LEARNERS, RESULTS)
    assert second != first
    assert _certificate(second).not_valid_after_utc >= _certificate(first).not_valid_after_utc
    assert not ground.needs_certificate(PROJECT, SERVICE)


def _age(settings: Settings, *, days: float) -> None:
    """So much is left."""
    (file,) = settings.projects_dir.rglob("agent-1.json")
    old = Authority(file.parent).issue(NAME, client=True, days=days)
    file.write_text(json.dumps({"addresses": [], "client": True, **asdict(old)}))


def test_a_broken_file_is_no_reason_to_start_anything_again(settings: Settings, ground: ImageGround) -> None:
    ground.specification(PROJECT, SPEC, SERVICE, LEARNERS, RESULTS)
    for path in settings.projects_dir.rglob("agent-1.json"):
        Path(path).write_text("{")
    assert not ground.needs_certificate(PROJECT, SERVICE)
