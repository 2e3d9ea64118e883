from pathlib import Path

import pytest

from flops.core.errors import ConflictError
from flops.core.ids import ProjectId
from flops.core.settings import Settings
from flops.manager.orchestrators import recall, remember


def test_what_was_asked_for_once_need_not_be_said_again(tmp_path: Path) -> None:
    asked = recall(Settings(home=tmp_path, orchestrator="docker", docker_host="unix:///d.sock"))
    remember(asked, [])
    later = recall(Settings(home=tmp_path))
    assert (later.orchestrator, later.docker_host) == ("docker", "unix:///d.sock")
    assert recall(Settings(home=tmp_path, orchestrator="swarm")).orchestrator == "swarm"


def test_without_a_word_services_are_processes(tmp_path: Path) -> None:
    assert recall(Settings(home=tmp_path)).orchestrator == "process"


def test_an_orchestrator_is_not_left_with_projects_on_it(tmp_path: Path) -> None:
    remember(recall(Settings(home=tmp_path, orchestrator="docker")), [])
    other = recall(Settings(home=tmp_path, orchestrator="process"))
    with pytest.raises(ConflictError) as caught:
        remember(other, [ProjectId("p-7k2mqd")])
    assert "1 project (p-7k2mqd)" in str(caught.value)
    assert "FLOPS_ORCHESTRATOR=docker" in str(caught.value)
    assert recall(Settings(home=tmp_path)).orchestrator == "docker"
    remember(other, [])
    assert recall(Settings(home=tmp_path)).orchestrator == "process"


def test_another_registry_is_no_reason_to_refuse(tmp_path: Path) -> None:
    remember(recall(Settings(home=tmp_path)), [])
    changed = recall(Settings(home=tmp_path, registry="registry.example:5000"))
    remember(changed, [ProjectId("p-7k2mqd")])
    assert recall(Settings(home=tmp_path)).registry == "registry.example:5000"
