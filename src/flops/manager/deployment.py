"""A project's services: their configuration files and what the orchestrator is asked to run.

Tokens are made once and kept in the configuration files (mode 600), so writing them again, after a crash
between two steps or after a restart of the manager, gives the same files.
"""

import hmac
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flops.core.ids import LearnerId, ProjectId, ServiceName, service_name
from flops.core.settings import Settings
from flops.core.spec import ProjectSpec
from flops.federation import (
    AgentConfig,
    AggregatorConfig,
    DataAccess,
    Link,
    Member,
    VirtualLearner,
)
from flops.manager.grounds import AGENT, AGGREGATOR, WORKER, Ground, aggregator_name, config_file, threads_of
from flops.manager.paths import ProjectPaths, data_token_file, write_private_json
from flops.manager.rows import VIRTUAL, Learner, Service
from flops.manager.topology import Aggregator, aggregators, home_of, places_itself
from flops.telemetry import NOBODYS, Traced

JOINED_START_S = 1800.0
"""Joined nodes fetch code and make environments after the aggregator has begun to wait for them."""


def learners_of(sites: Sequence[Mapping[str, Any]]) -> list[Learner]:
    """One learner for each chosen site."""
    return [
        Learner(LearnerId(f"learner-{number}"), number, str(site["site"]), node=str(site.get("node", "")))
        for number, site in enumerate(sites, start=1)
    ]


def services_of(
    project: ProjectId,
    spec: ProjectSpec,
    learners: Sequence[Learner],
    numbers: Mapping[str, int],
    *,
    workers: bool,
) -> list[Service]:
    """The aggregators first, the root before its clusters: members look for them.

    Args:
        numbers: of the clusters, by path.
        workers: whether those that run user code are services of their own, beside their agents.
    """
    return [
        Service(service_name(project, AGGREGATOR), AGGREGATOR, None),
        *(
            Service(service_name(project, AGGREGATOR, number), AGGREGATOR, None, cluster=cluster)
            for cluster, number in numbers.items()
        ),
        *(
            Service(service_name(project, role, agent.number), role, agent.name)
            for agent in _agents(spec, learners, numbers)
            for role in ((AGENT, WORKER) if workers else (AGENT,))
        ),
    ]


def write_spec(settings: Settings, project: ProjectId, spec: ProjectSpec) -> None:
    """Keep the whole spec, credentials of the repository's address included, in a private file."""
    write_private_json(ProjectPaths.of(settings, project).config / "spec.json", spec.to_json())


def read_spec(settings: Settings, project: ProjectId) -> dict[str, Any]:
    path = ProjectPaths.of(settings, project).config / "spec.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def report_token_fits(settings: Settings, project: ProjectId, token: str) -> bool:
    """Whether a reporter proved to be this project's; in constant time."""
    path = _tokens_file(settings, project)
    try:
        expected = str(json.loads(path.read_text(encoding="utf-8"))["project"])
    except FileNotFoundError:
        return False
    return hmac.compare_digest(expected.encode(), token.encode())


def write_configurations(
    settings: Settings,
    ground: Ground,
    project: ProjectId,
    spec: ProjectSpec,
    learners: Sequence[Learner],
    results: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
    numbers: Mapping[str, int],
    traced: Traced = NOBODYS,
) -> None:
    """Write what every aggregator and every agent need to know.

    Args:
        rounds: to train in all: those of the spec, and those that were asked for later; of a hierarchy:
            cycles.
        results: of the preparing steps, by name.
        numbers: of the clusters, by path.
        traced: the request that the project was set in motion by.
    """
    paths = ProjectPaths.of(settings, project)
    paths.config.mkdir(parents=True, exist_ok=True, mode=0o700)
    paths.state.mkdir(exist_ok=True)
    paths.logs.mkdir(exist_ok=True)
    tokens = _tokens(settings, project, learners, numbers)
    examples = {site["site"]: site["num_examples"] for site in results["data"]["sites"]}
    newcomers = {
        str(learner.learner): Member(tokens["learners"][learner.learner], slot=learner.number)
        for learner in (learners if places_itself(spec) else ())
    }
    for aggregator in aggregators(spec, learners, examples, rounds, numbers):
        name = aggregator_name(project, aggregator.number).removeprefix(f"{project}-")
        file = config_file(settings, project, name)
        told = _aggregator_config(ground, project, aggregator, numbers, tokens, newcomers)
        if any(ground.is_joined(learner) for learner in learners):
            patient_s = max(told.plan.start_deadline_s, JOINED_START_S)
            told = replace(told, plan=replace(told.plan, start_deadline_s=patient_s))
        replace(told, traced=traced).write(file)
    training = spec.training
    data_token = data_token_file(settings).read_text(encoding="ascii").strip()
    access = DataAccess(location=ground.data(), token=data_token, tags=tuple(results["data"]["tags"]))
    agents = _agents(spec, learners, numbers)
    for agent in agents:
        joined = ground.is_joined(agent.learners[0])
        number = numbers.get(home_of(spec, agent.learners[0]) or "")
        seats = [
            VirtualLearner(
                learner.learner,
                tokens["learners"][learner.learner],
                seed=(training.seed + learner.number) % 2**32,
                site=learner.site,
            )
            for learner in agent.learners
        ]
        agent_config = AgentConfig(
            project=project,
            aggregator=ground.location(project, number, joined=joined),
            tls=None if joined else ground.members_tls(project, agent.name),
            data=replace(access, location="", token="") if joined else access,
            threads=_threads(spec, len(learners), joined=joined),
            memory_mb=spec.resources.memory_mb,
            placed=bool(newcomers),
            traced=traced,
            **({} if joined else ground.agent(project, agent.name, results)),
        )
        if training.virtual:
            agent_config = replace(agent_config, virtual=tuple(seats), workers=_workers(spec, len(agents)))
        else:
            agent_config = agent_config.of(seats[0])
        agent_config.write(config_file(settings, project, agent.name))


def _threads(spec: ProjectSpec, learners: int, *, joined: bool) -> int | None:
    """Of a learner on a machine of its own: all, unless the spec says otherwise."""
    return None if joined and spec.resources.vcpus is None else threads_of(spec, learners)


@dataclass(frozen=True)
class _Agent:
    """One agent, named after its learner, and those that it is there for."""

    name: LearnerId
    number: int | None
    learners: Sequence[Learner]


def _agents(spec: ProjectSpec, learners: Sequence[Learner], numbers: Mapping[str, int]) -> list[_Agent]:
    """One for each learner; virtual learners share one, those of a cluster in a hierarchy."""
    if not spec.training.virtual:
        return [_Agent(learner.learner, learner.number, [learner]) for learner in learners]
    together: dict[int | None, list[Learner]] = {}
    for learner in learners:
        together.setdefault(numbers.get(home_of(spec, learner) or ""), []).append(learner)
    return [
        _Agent(LearnerId(VIRTUAL if number is None else f"{VIRTUAL}-{number}"), number, members)
        for number, members in together.items()
    ]


def _workers(spec: ProjectSpec, agents: int) -> int:
    """Processes of one agent of virtual learners that run user code."""
    return max(1, (spec.training.virtual_workers or os.cpu_count() or 1) // agents)


def _aggregator_config(
    ground: Ground,
    project: ProjectId,
    aggregator: Aggregator,
    numbers: Mapping[str, int],
    tokens: Mapping[str, Any],
    newcomers: Mapping[str, Member],
) -> AggregatorConfig:
    parent = None
    if aggregator.cluster is not None:
        above = numbers.get(aggregator.parent or "")
        parent = Link(
            ground.location(project, above),
            aggregator.cluster,
            tokens["clusters"][aggregator.cluster],
            tls=ground.members_tls(project, aggregator_name(project, aggregator.number)),
            placed=bool(newcomers),
        )
    addresses = {path: ground.location(project, number) for path, number in numbers.items()}
    quarters = ground.aggregator(project, aggregator.number, tokens["project"])
    return AggregatorConfig(
        project=project,
        listen=quarters.listen,
        members={
            name: Member(
                tokens["learners" if seat.kind == "learner" else "clusters"][name],
                seat.max_examples,
                seat.slot,
                seat.kind,
            )
            for name, seat in aggregator.seats.items()
        },
        initial_model=quarters.initial_model,
        state_dir=quarters.state_dir,
        plan=aggregator.plan,
        tls=quarters.tls,
        report=quarters.report,
        parent=parent,
        newcomers=newcomers if parent is None else {},
        addresses=addresses if newcomers and parent is None else {},
    )


def log_of_code(settings: Settings, project: ProjectId, learner: LearnerId) -> str | None:
    """Where the user's code of a learner prints, relative name checked by the caller's own list."""
    path = ProjectPaths.of(settings, project).logs / f"{learner}.log"
    return str(path) if path.exists() else None


def names(services: Sequence[Service]) -> list[ServiceName]:
    return [service.name for service in services]


def _tokens_file(settings: Settings, project: ProjectId) -> Any:
    return ProjectPaths.of(settings, project).config / "tokens.json"


def _tokens(
    settings: Settings, project: ProjectId, learners: Sequence[Learner], clusters: Iterable[str]
) -> dict[str, Any]:
    path = _tokens_file(settings, project)
    if not path.exists():
        write_private_json(
            path,
            {
                "project": secrets.token_urlsafe(32),
                "learners": {learner.learner: secrets.token_urlsafe(32) for learner in learners},
                "clusters": {cluster: secrets.token_urlsafe(32) for cluster in clusters},
            },
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
