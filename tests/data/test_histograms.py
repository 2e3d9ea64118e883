import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flops.core.errors import ConflictError, FailedError, InvalidInputError, NotFoundError
from flops.data import DataClient
from tests.data.conftest import TOKEN, StartServer

NAMES = ["cat", "dog", "emu"]
CLASSES = {"info": {"features": {"label": {"_type": "ClassLabel", "names": NAMES}}}}


def labelled(labels: Sequence[int | None], split: str | None = None) -> pa.Table:
    columns: dict[str, object] = {"label": pa.array(labels, pa.int64()), "x": list(range(len(labels)))}
    if split:
        columns["split"] = [split] * len(labels)
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(CLASSES)})


MANY = labelled([0] * 5000 + [1] * 3000)


def test_counts_are_near_the_truth_and_never_below_zero(data_client: DataClient, site: str) -> None:
    data_client.put(MANY, ["t"], site, allow_metrics=True)
    counts = data_client.histogram(["t"], site, 1.0)
    assert list(counts) == NAMES
    assert abs(counts["cat"] - 5000) < 100
    assert abs(counts["dog"] - 3000) < 100
    assert 0 <= counts["emu"] < 100


def test_noise_grows_as_epsilon_falls(data_client: DataClient, site: str) -> None:
    def deviation(epsilon: float) -> float:
        errors = []
        for number in range(30):
            place = f"{site} {epsilon} {number}"
            data_client.put(MANY, ["t"], place, allow_metrics=True)
            counts = data_client.histogram(["t"], place, epsilon)
            errors += [counts["cat"] - 5000, counts["dog"] - 3000]
        return statistics.stdev(errors)

    # Standard deviation of discrete Laplace noise of scale 2 / epsilon: about sqrt(2) * 2 / epsilon.
    assert 15 < deviation(0.1) < 50
    assert 0.1 < deviation(2.0) < 3


def test_the_same_question_has_the_same_answer_and_costs_nothing(data_client: DataClient, site: str) -> None:
    data_client.put(MANY, ["a", "b"], site, allow_metrics=True)
    first = data_client.histogram(["a"], site, 0.01)
    assert all(data_client.histogram(tags, site, 0.01) == first for tags in (["a"], ["b"], ["a", "b"]) * 20)


def test_other_questions_spend_the_budget_of_the_data(data_client: DataClient, site: str) -> None:
    data_client.put(MANY, ["a"], site, allow_metrics=True)
    data_client.put(labelled([0, 1]), ["b"], site, allow_metrics=True)
    data_client.histogram(["a"], site, 6.0)
    with pytest.raises(ConflictError, match=r"epsilon 5 is more than the 4 left of its privacy budget of 10"):
        data_client.histogram(["a"], site, 5.0)
    with pytest.raises(ConflictError, match="more than the 4 left"):
        data_client.histogram(["a", "b"], site, 4.5)
    data_client.histogram(["b"], site, 10.0)
    with pytest.raises(ConflictError, match="more than the 0 left"):
        data_client.histogram(["a", "b"], site, 1.0)
    data_client.histogram(["a"], site, 6.0)


def test_neither_a_restart_nor_a_new_put_refills_the_budget(start_data_server: StartServer) -> None:
    server = start_data_server()
    with DataClient(server.location, TOKEN) as client:
        client.put(MANY, ["t"], "s", allow_metrics=True)
        first = client.histogram(["t"], "s", 0.5)
    server.kill()
    server = start_data_server("--privacy-budget", "1", home=server.home)
    with DataClient(server.location, TOKEN) as client:
        client.drop(tags=["t"])
        client.put(MANY, ["another tag"], "s", allow_metrics=True)
        assert client.histogram(["another tag"], "s", 0.5) == first
        with pytest.raises(ConflictError, match=r"more than the 0\.5 left of its privacy budget of 1"):
            client.histogram(["another tag"], "s", 0.6)


def test_the_owner_decides(data_client: DataClient, site: str) -> None:
    data_client.put(MANY, ["t"], site, allow_metrics=True)
    other = data_client.put(labelled([0]), ["t"], site)
    with pytest.raises(ConflictError, match=f"the owner of {other.id} at site .* does not allow metrics"):
        data_client.histogram(["t"], site, 1.0)


def test_test_examples_and_rows_of_no_class_do_not_count(data_client: DataClient, site: str) -> None:
    data_client.put(labelled([0] * 300 + [None] * 500 + [-1] * 500, "train"), ["t"], site, allow_metrics=True)
    data_client.put(labelled([1] * 1000, "test"), ["t"], site, allow_metrics=True)
    counts = data_client.histogram(["t"], site, 5.0)
    assert abs(counts["cat"] - 300) < 20
    assert counts["dog"] < 20


def test_rows_that_lie_there_twice_count_once(data_client: DataClient, site: str) -> None:
    data_client.put(MANY, ["a"], site, allow_metrics=True)
    data_client.put(MANY, ["b"], site, allow_metrics=True)
    assert abs(data_client.histogram(["a", "b"], site, 5.0)["cat"] - 5000) < 20


def test_questions_that_cannot_be_answered_are_told_why(data_client: DataClient, site: str) -> None:
    with pytest.raises(NotFoundError):
        data_client.histogram(["t"], site, 1.0)
    data_client.put(pa.table({"label": ["a", "b"]}), ["t"], site, allow_metrics=True)
    with pytest.raises(InvalidInputError, match="do not say which classes there are"):
        data_client.histogram(["t"], site, 1.0)
    for epsilon in (0, -1, 101, float("nan"), "1", None, True):
        with pytest.raises(InvalidInputError, match=r"epsilon is .* - use a number above 0, at most 100"):
            data_client.histogram(["t"], site, epsilon)  # type: ignore[arg-type]


def test_several_columns_of_classes_give_the_one_called_label(data_client: DataClient, site: str) -> None:
    features = {
        "kind": {"_type": "ClassLabel", "names": ["x", "y"]},
        "label": {"_type": "ClassLabel", "names": ["no", "yes"]},
    }
    table = pa.table({"kind": [0] * 99, "label": np.ones(99, np.int8)})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    data_client.put(table.replace_schema_metadata(metadata), ["t"], site, allow_metrics=True)
    assert data_client.histogram(["t"], site, 5.0)["yes"] > 80


def test_without_its_ledger_nothing_is_answered(start_data_server: StartServer, new_home: object) -> None:
    server = start_data_server()
    with DataClient(server.location, TOKEN) as client:
        client.put(MANY, ["t"], "s", allow_metrics=True)
        client.histogram(["t"], "s", 0.5)
    server.kill()
    (server.root / "histograms.json").write_text("{")
    with pytest.raises(AssertionError, match=r"the ledger of histograms .* is damaged"):
        start_data_server(home=server.home)


def test_failed_error_is_what_a_damaged_ledger_raises(tmp_path: Path) -> None:
    from flops.data.histograms import Histograms
    from flops.data.store import FragmentStore

    store = FragmentStore(tmp_path / "data")
    (tmp_path / "ledger").write_text('{"spent": {"a": "much"}, "answers": {}}')
    with pytest.raises(FailedError):
        Histograms(store, tmp_path / "ledger")
    store.close()
