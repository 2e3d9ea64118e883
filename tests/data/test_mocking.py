import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flops.core.errors import InvalidInputError
from flops.data import DataClient, Partition, known_dataset, mock, tags_of_test_split


@pytest.fixture(scope="session")
def datasets_dir(new_home: Callable[[], Path]) -> Path:
    return new_home()


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards"])
def test_every_example_lies_at_one_site(
    data_client: DataClient, datasets_dir: Path, partition: Partition
) -> None:
    sites = [f"{partition} site {number}" for number in range(5)]
    fragments = mock(
        data_client, "digits", [partition], sites, datasets_dir=datasets_dir, partition=partition
    )
    assert [fragment.site for fragment in fragments] == sites
    parts = [data_client.get_matching([partition], site) for site in sites]
    whole = pq.read_table(known_dataset("digits", datasets_dir))
    assert all(part.schema.equals(whole.schema, check_metadata=True) for part in parts)

    def images(table: pa.Table) -> list[tuple[bytes, int]]:
        return sorted((row["image"]["bytes"], row["label"]) for row in table.to_pylist())

    assert images(pa.concat_tables(parts)) == images(whole)


def test_the_same_arguments_put_nothing_new(data_client: DataClient, datasets_dir: Path, site: str) -> None:
    def put(seed: int) -> list[str]:
        fragments = mock(
            data_client,
            "digits",
            ["t"],
            [site, site + "2"],
            datasets_dir=datasets_dir,
            partition="dirichlet",
            alpha=0.1,
            seed=seed,
            num_examples=100,
        )
        return [fragment.id for fragment in fragments]

    assert put(1) == put(1)
    assert len(data_client.list(["t"], site)) == 1
    assert put(1) != put(2)
    labels = data_client.get_matching(["t"], site)["label"].to_numpy()
    assert len(labels) == 100
    assert np.bincount(labels).max() > 20


def test_test_examples_are_found_only_by_those_who_ask_for_them(
    data_client: DataClient, datasets_dir: Path, site: str
) -> None:
    sites = [f"{site} {number}" for number in range(4)]
    fragments = mock(
        data_client,
        "digits",
        ["split"],
        sites,
        datasets_dir=datasets_dir,
        partition="shards",
        test_split=True,
        num_examples=400,
    )
    assert [fragment.site for fragment in fragments] == sites * 2
    both = ["split", *tags_of_test_split(["split"])]
    rows = {"train": 0, "test": 0}
    for where in sites:
        training = data_client.get_matching(["split"], where)
        assert set(training["split"].to_pylist()) == {"train"}
        assert json.loads(training.schema.metadata[b"huggingface"])["info"]["features"]["split"]
        together = data_client.get_matching(both, where)
        for split in rows:
            rows[split] += together.filter(pc.equal(together["split"], split)).num_rows
        test = together.filter(pc.equal(together["split"], "test"))
        assert len(set(test["label"].to_pylist())) >= 8  # alike at every site, not by shards
    assert rows == {"train": 400, "test": 360}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["a", "a"]}, "'a' is named twice - name every site once"),
        ({"sites": []}, "there is no site to give data to"),
        ({"num_examples": 0}, "0 examples of digits were asked for - use 1 to 1437"),
        ({"num_examples": 2000}, "2000 examples of digits were asked for"),
        ({"partition": "shards", "shards_per_site": 1000}, "1437 examples cannot be cut into 2000 shards"),
        ({"num_examples": 1}, "1 examples cannot be spread over 2 sites"),
        ({"partition": "random"}, "'random' is no partition - use iid, dirichlet or shards"),
        ({"seed": -1}, "the seed is -1 - use 0 or more"),
        ({"dataset": "cifar"}, "'cifar' is not a known data set"),
        ({"tags": []}, "no data tag was given"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    data_client: DataClient, datasets_dir: Path, arguments: dict[str, object], message: str
) -> None:
    usual: dict[str, object] = {"dataset": "digits", "tags": ["t"], "sites": ["a", "b"]}
    with pytest.raises(InvalidInputError, match=message):
        mock(data_client, datasets_dir=datasets_dir, **(usual | arguments))  # type: ignore[arg-type]
