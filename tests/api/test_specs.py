"""Specs are checked without starting anything."""

import httpx


def validate(client: httpx.Client, spec: object) -> dict[str, object]:
    answer = client.post("/v1/specs/validate", json={"spec": spec})
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_a_good_spec_comes_back_whole_and_starts_nothing(client: httpx.Client) -> None:
    found = validate(client, {"repo": "https://user:secret@example.org/r@v1", "data": {"mock": "digits"}})
    assert found["valid"] is True
    spec = found["spec"]
    assert isinstance(spec, dict)
    assert spec["training"]["learners"] == 3
    assert spec["ref"] == "v1"
    assert "secret" not in str(spec)
    assert client.get("/v1/projects").json()["projects"] == []


def test_every_problem_is_told_with_its_field(client: httpx.Client) -> None:
    found = validate(client, {"repo": "r", "training": {"rounds": 0, "learners": "x"}, "color": 1})
    assert found["valid"] is False
    problems = found["problems"]
    assert isinstance(problems, list)
    assert {one["field"] for one in problems} == {"training.rounds", "training.learners", "color"}
    assert all(one["message"].startswith(one["field"]) for one in problems)


def test_a_strategy_that_is_not_there_is_told_with_the_nearest(client: httpx.Client) -> None:
    found = validate(client, {"repo": "r", "training": {"strategy": "FedAvgg"}})
    assert found["problems"] == [
        {
            "field": "training.strategy",
            "message": "strategy 'FedAvgg' is unknown - did you mean FedAvg?",
        }
    ]


def test_strategies_are_listed(client: httpx.Client) -> None:
    assert {"FedAvg", "FedAdam", "FedBuff"} <= set(client.get("/v1/specs/strategies").json()["strategies"])
