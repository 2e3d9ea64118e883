"""What the manager makes of a project with virtual learners."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.ids import LearnerId, ProjectId
from flops.core.settings import Settings
from flops.core.spec import spec_from_mapping
from flops.federation import AgentConfig, VirtualLearner
from flops.manager import deployment
from flops.manager.databases import open_own_database
from flops.manager.grounds import AGENT, ProgramGround
from flops.manager.paths import ProjectPaths, data_token_file
from flops.manager.ports import Ports
from flops.manager.rows import Learner
from flops.manager.store import Store

if TYPE_CHECKING:
    from flops.core.spec import ProjectSpec

PROJECT = ProjectId("p-7k2mqd")


def spec(**training: Any) -> ProjectSpec:
    return spec_from_mapping(
        {"repo": "https://example.org/x/y", "data": {"tags": ["t"]}, "training": {"seed": 5, **training}}
    )


def learners(*clusters: str | None) -> list[Learner]:
    return [
        Learner(LearnerId(f"learner-{number}"), number, f"site-{number}", cluster=cluster)
        for number, cluster in enumerate(clusters, start=1)
    ]


@pytest.fixture
def configured(tmp_path: Path) -> Any:
    """Writes the configurations of a project; returns those of its agents by name."""
    settings = Settings(home=tmp_path)
    data_token_file(settings).parent.mkdir(parents=True, exist_ok=True)
    data_token_file(settings).write_text("secret")
    paths = ProjectPaths.of(settings, PROJECT)
    paths.folder.mkdir(parents=True)

    def make(wanted: ProjectSpec, who: list[Learner]) -> dict[str, AgentConfig]:
        results: dict[str, dict[str, Any]] = {
            "data": {
                "sites": [{"site": one.site, "num_examples": 10} for one in who],
                "tags": ["t"],
            },
            "environment": {"python": "/env/bin/python"},
            "fetch": {"path": "/code"},
        }
        numbers = {path: number for number, path in enumerate(sorted({one.cluster or "" for one in who}), 1)}
        numbers.pop("", None)
        store = Store(open_own_database(settings))
        ground = ProgramGround(settings, Ports(tmp_path / "ports.json"), store)
        deployment.write_configurations(
            settings, ground, PROJECT, wanted, who, results, rounds=3, numbers=numbers
        )
        store.close()
        agents = [
            one
            for one in deployment.services_of(PROJECT, wanted, who, numbers, workers=False)
            if one.role == AGENT
        ]
        by_name = {str(one.learner): one for one in who}
        files = {
            str(one.learner): ground.specification(PROJECT, wanted, one, by_name, results).command[-1]
            for one in agents
        }
        assert all(Path(file).stat().st_mode & 0o77 == 0 for file in files.values())
        return {name: AgentConfig.read(Path(file)) for name, file in files.items()}

    return make


def test_virtual_learners_share_one_agent_with_a_few_workers(configured: Any) -> None:
    (agent,) = configured(spec(virtual=True, virtual_workers=3), learners(*[None] * 5)).values()
    assert agent.workers == 3
    assert [(one.learner, one.seed, one.site) for one in agent.virtual] == [
        (f"learner-{number}", 5 + number, f"site-{number}") for number in range(1, 6)
    ]
    assert len({one.token for one in agent.virtual}) == 5


def test_a_virtual_learner_has_the_seed_threads_and_limits_of_one_with_its_own_processes(
    configured: Any,
) -> None:
    who = learners(*[None] * 3)
    (virtual,) = configured(spec(virtual=True), who).values()
    alone = configured(spec(), who)
    assert [one.learners() for one in alone.values()] == [(one,) for one in virtual.virtual]
    assert {(one.threads, one.memory_mb) for one in alone.values()} == {(virtual.threads, virtual.memory_mb)}
    assert [one.link(one.learners()[0]) for one in alone.values()] == [
        virtual.link(one) for one in virtual.virtual
    ]


def test_in_a_hierarchy_every_cluster_has_an_agent_of_its_own(configured: Any) -> None:
    wanted = spec(
        virtual=True,
        virtual_workers=4,
        clusters={"groups": {"north": ["site-1", "site-3"], "south": ["site-2", "site-4"]}},
    )
    agents = configured(wanted, learners("north", "south", "north", "south"))
    assert list(agents) == ["virtual-learners-1", "virtual-learners-2"]
    assert [[one.site for one in agent.virtual] for agent in agents.values()] == [
        ["site-1", "site-3"],
        ["site-2", "site-4"],
    ]
    assert [agent.workers for agent in agents.values()] == [2, 2]
    assert len({agent.aggregator for agent in agents.values()}) == 2
    assert isinstance(agents["virtual-learners-1"].virtual[0], VirtualLearner)
