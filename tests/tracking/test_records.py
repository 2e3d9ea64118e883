import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.errors import InvalidInputError
from flops.tracking import (
    ArtifactExported,
    ModelExported,
    Record,
    RoundMetrics,
    RunEnded,
    RunStarted,
    run_started,
)
from flops.tracking.naming import experiment, folder, key, model
from flops.tracking.records import record_from_json, record_to_json

EXAMPLES: list[Record] = [
    RunStarted(time=1.25, experiment="digits", name="p-aaaa", tags={"a": "b"}, params={"c": "1"}),
    RoundMetrics(time=2.0, step=3, metrics={"loss": 0.5}),
    ModelExported(time=3.0, round=3, name="digits", directory="/x", aliases=("best",)),
    ArtifactExported(time=4.0, round=3, file="/x/parameters.safetensors"),
    RunEnded(time=5.0, status="KILLED", reason="stopped by its owner"),
]


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: str(record.kind))
def test_a_record_is_the_same_after_its_way_through_json(record: Record) -> None:
    assert record_from_json(record_to_json(record)) == record


@given(st.dictionaries(st.text(), st.floats()), st.floats(0, 1e10), st.integers(0, 1 << 40))
def test_any_metrics_survive_json_on_one_line(metrics: dict[str, float], time: float, step: int) -> None:
    line = record_to_json(RoundMetrics(time=time, step=step, metrics=metrics))
    assert b"\n" not in line
    read = record_from_json(line)
    assert isinstance(read, RoundMetrics)
    assert (read.time, read.step, read.metrics.keys()) == (time, step, metrics.keys())
    for name, value in metrics.items():
        assert read.metrics[name] == value or math.isnan(value)


def test_a_field_of_a_newer_writer_is_passed_over() -> None:
    read = record_from_json('{"kind":"metrics","time":1,"step":2,"metrics":{},"unit":"m"}')
    assert read == RoundMetrics(time=1, step=2, metrics={})


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"kind":"gossip"}', "does not match any of the expected tags: 'run', 'metrics'"),
        ('{"kind":"metrics","step":1,"metrics":{}}', "metrics.time: Field required"),
        ('{"kind":"end","time":1,"status":"MAYBE"}', "'FINISHED', 'FAILED' or 'KILLED'"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_cause(line: str, cause: str) -> None:
    with pytest.raises(InvalidInputError, match="a line is no tracking record") as caught:
        record_from_json(line)
    assert cause in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        RoundMetrics(time=1.0, step=1 << 63, metrics={}),
        RoundMetrics(time=float("nan"), step=1, metrics={}),
        RoundMetrics(time=-1.0, step=1, metrics={}),
        RoundMetrics(time=1.0, step=1, metrics={"loss": "low"}),  # type: ignore[dict-item]
    ],
)
def test_a_record_that_could_never_be_stored_is_refused_when_it_is_written(record: Record) -> None:
    with pytest.raises(InvalidInputError, match="a 'metrics' record cannot be written"):
        record_to_json(record)


def test_a_run_carries_what_an_auditor_asks_for() -> None:
    record = run_started(
        time=1.0,
        experiment="digits",
        name="p-aaaa",
        spec={"training": {"rounds": 3, "quorum": None}, "data": {"tags": ["a"]}, "name": "x"},
        repository="https://example.org/digits.git",
        commit="abc123",
        lock="sha-1",
        mode="classic",
        strategy="FedAvg",
        tags={"flops.manager": "m"},
    )
    assert record.params == {"training.rounds": "3", "data.tags": '["a"]', "name": "x"}
    assert record.tags["flops.commit"] == record.tags["mlflow.source.git.commit"] == "abc123"
    assert record.tags["flops.spec"].startswith('{"data": {"tags"')
    assert set(record.tags) >= {"flops.repository", "flops.lock", "flops.mode", "flops.strategy"}
    assert record.tags["flops.manager"] == "m"


@given(st.text())
def test_any_text_becomes_a_key_and_a_model_name_that_stay_what_they_are(text: str) -> None:
    assert key(key(text)) == key(text) != ""
    assert model(model(text)) == model(text) != ""
    assert not set(model(text)) & set("/:.%\"'")
    assert experiment(text)
    assert "/" not in folder(text)
    assert ".." not in key(text).split("/")
