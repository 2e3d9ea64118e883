"""One request, from the API to the learner: found again in every log, beside nothing that is private."""

import json
from pathlib import Path
from typing import Any

import pytest

from flops.telemetry import Line, parse

pytestmark = [pytest.mark.network, pytest.mark.slow]

User = Any
Repository = Any
CANARY = "778899112233"


def test_a_request_is_found_from_the_api_to_every_learner(user: User, repository: Repository) -> None:
    project = user.project(str(repository()), "--tag", "e2e", "--rounds", "2")
    assert project["state"] == "finished", project["reason"]
    requests = {data["request"] for data in user.events(project["id"], "project.state")}
    assert len(requests) == 1
    request = requests.pop()
    found = user.flops("logs", project["id"], "--trace", request, "--json").document
    lines = {name: _parsed(text) for name, text in found.items() if text}
    assert {line.facts["request"] for some in lines.values() for line in some} == {request}
    by_service = {line.facts["service"]: line.facts for some in lines.values() for line in some}
    assert by_service.keys() == {"manager", "step", "aggregator", "agent"}
    assert {facts["project"] for facts in by_service.values()} == {project["id"]}
    agents = [line.facts for some in lines.values() for line in some if line.facts["service"] == "agent"]
    assert {(facts.get("learner"), facts.get("round")) for facts in agents} >= {
        (f"learner-{learner}", round_number) for learner in (1, 2, 3) for round_number in ("1", "2")
    }
    asked = [line.message for line in lines["manager"]]
    assert "POST /v1/projects: 201, for admin" in asked
    loggers = {json.loads(text.splitlines()[0])["logger"] for name, text in found.items() if "agent" in name}
    assert all(logger.startswith("flops.") for logger in loggers)
    shown = user.flops("logs", project["id"], "--trace", request).stdout
    assert "trained for round 2" in shown
    assert '"message"' not in shown
    assert user.flops("logs", project["id"], "--trace", "another").stdout == ""
    entries = user.flops("audit", "ls", "--json").document
    assert request in json.dumps(entries)


def _parsed(text: str) -> list[Line]:
    lines = [parse(line) for line in text.splitlines()]
    assert None not in lines
    return [line for line in lines if line is not None]


def test_no_log_holds_a_token_a_credential_or_a_value_of_the_data(
    user: User, repository: Repository, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("x,y\n" + "".join(f"{CANARY},{number % 2}\n" for number in range(20)))
    assert user.flops("data", "put", str(table), "--tag", "secret", "--site", "north").code == 0
    project = user.project(str(repository()), "--tag", "secret", "--rounds", "1")
    assert project["state"] == "finished", project["reason"]
    refused = user.flops("run", f"https://somebody:{CANARY}@127.0.0.1:1/r.git", "--tag", "secret")
    assert refused.code == 1
    home: Path = user.home
    secrets = [CANARY, (home / "token").read_text().strip(), (home / "data.token").read_text().strip()]
    tokens = json.loads((home / "projects" / project["id"] / "config" / "tokens.json").read_text())
    secrets += [tokens["project"], *tokens["learners"].values()]
    logs = [path for path in home.rglob("*.log") if path.is_file()]
    assert {path.name for path in logs} >= {"manager.log", "preparation.log", "flops-data.log"}
    for path in logs:
        text = path.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], path
