"""A project's services: their configuration files and what the orchestrator is asked to run.

Tokens are made once and kept in the configuration files (mode 600), so writing them again, after a crash
between two steps or after a restart of the manager, gives the same files.
"""

import hmac
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flops.core.ids import LearnerId, ProjectId, ServiceName, service_name
from flops.core.settings import Settings
from flops.core.spec import ProjectSpec
from flops.federation import (
    AgentConfig,
    AggregatorConfig,
    DataAccess,
    Member,
    Plan,
    ReportTo,
)
from flops.manager.paths import ProjectPaths, data_token_file, write_private_json
from flops.manager.rows import Learner, Service
from flops.orchestration import ServiceSpec

AGGREGATOR = "aggregator"
AGENT = "agent"
_PROGRAMS = {AGGREGATOR: "flops.federation.aggregator", AGENT: "flops.agent"}


def learners_of(sites: Sequence[Mapping[str, Any]]) -> list[Learner]:
    """One learner for each chosen site."""
    return [
        Learner(LearnerId(f"learner-{number}"), number, str(site["site"]))
        for number, site in enumerate(sites, start=1)
    ]


def services_of(project: ProjectId, learners: Sequence[Learner]) -> list[Service]:
    """The aggregator first: agents look for it."""
    return [
        Service(service_name(project, AGGREGATOR), AGGREGATOR, None),
        *(
            Service(service_name(project, AGENT, learner.number), AGENT, learner.learner)
            for learner in learners
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
    project: ProjectId,
    spec: ProjectSpec,
    learners: Sequence[Learner],
    results: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
) -> None:
    """Write what the aggregator and every agent need to know.

    Args:
        rounds: to train in all: those of the spec, and those that were asked for later.
        results: of the preparing steps, by name.
    """
    paths = ProjectPaths.of(settings, project)
    paths.config.mkdir(parents=True, exist_ok=True, mode=0o700)
    paths.state.mkdir(exist_ok=True)
    paths.logs.mkdir(exist_ok=True)
    tokens = _tokens(settings, project, learners)
    examples = {site["site"]: site["num_examples"] for site in results["data"]["sites"]}
    location = f"grpc+unix://{settings.run_dir / project}.sock"
    training = spec.training
    AggregatorConfig(
        project=project,
        listen=location,
        members={
            learner.learner: Member(tokens["learners"][learner.learner], examples[learner.site])
            for learner in learners
        },
        initial_model=str(paths.initial_model),
        state_dir=str(paths.state),
        plan=Plan(
            rounds=rounds,
            strategy=training.strategy.name,
            strategy_parameters=training.strategy.parameters,
            fraction_fit=training.fraction_fit,
            fraction_evaluate=training.fraction_evaluate,
            min_available_learners=training.min_available_learners,
            min_fit_learners=training.min_fit_learners,
            min_evaluate_learners=training.min_evaluate_learners,
            quorum=training.quorum,
            start_deadline_s=training.start_deadline_s,
            round_deadline_s=training.round_deadline_s,
            seed=training.seed,
            selection_metric=spec.selection.metric,
            selection_best=spec.selection.best or "min",
            learner_metrics=spec.tracking.learner_metrics,
        ),
        report=ReportTo(
            socket=str(settings.manager_socket),
            token=tokens["project"],
            url_path=f"/internal/v1/projects/{project}/reports",
        ),
    ).write(paths.config / "aggregator.json")
    data_token = data_token_file(settings).read_text(encoding="ascii").strip()
    for learner in learners:
        AgentConfig(
            project=project,
            learner=learner.learner,
            token=tokens["learners"][learner.learner],
            aggregator=location,
            python=results["environment"]["python"],
            code=results["fetch"]["path"],
            data=DataAccess(
                location=f"grpc+unix://{settings.data_socket}",
                token=data_token,
                tags=tuple(results["data"]["tags"]),
                site=learner.site,
            ),
            threads=_threads(spec, len(learners)),
            memory_mb=spec.resources.memory_mb,
            seed=(training.seed + learner.number) % 2**32,
            log=str(paths.logs / f"{learner.learner}.log"),
        ).write(paths.config / f"{learner.learner}.json")


def service_spec(settings: Settings, project: ProjectId, service: Service) -> ServiceSpec:
    """What the orchestrator runs; the same answer each time it is asked for the same service."""
    paths = ProjectPaths.of(settings, project)
    subject = service.learner or AGGREGATOR
    return ServiceSpec(
        name=service.name,
        command=(
            sys.executable,
            "-P",  # the working directory holds the user's code, which must not be importable here
            "-m",
            _PROGRAMS[service.role],
            "--config",
            str(paths.config / f"{subject}.json"),
        ),
        role=service.role,
        project=project,
        directory=paths.folder,
    )


def log_of_code(settings: Settings, project: ProjectId, learner: LearnerId) -> str | None:
    """Where the user's code of a learner prints, relative name checked by the caller's own list."""
    path = ProjectPaths.of(settings, project).logs / f"{learner}.log"
    return str(path) if path.exists() else None


def names(services: Sequence[Service]) -> list[ServiceName]:
    return [service.name for service in services]


def _tokens_file(settings: Settings, project: ProjectId) -> Any:
    return ProjectPaths.of(settings, project).config / "tokens.json"


def _tokens(settings: Settings, project: ProjectId, learners: Sequence[Learner]) -> dict[str, Any]:
    path = _tokens_file(settings, project)
    if not path.exists():
        write_private_json(
            path,
            {
                "project": secrets.token_urlsafe(32),
                "learners": {learner.learner: secrets.token_urlsafe(32) for learner in learners},
            },
        )
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _threads(spec: ProjectSpec, learners: int) -> int:
    if spec.resources.vcpus is not None:
        return max(1, round(spec.resources.vcpus))
    return max(1, (os.cpu_count() or 1) // learners)
