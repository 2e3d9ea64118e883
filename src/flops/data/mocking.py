"""Mock data: a known data set spread over sites, as if each had collected its part.

A data set's test examples stay out unless they are asked for: then they lie in fragments of their own, under
tags of their own (`tags_of_test_split`), so that whoever names only the usual tags gets training examples
only. Both kinds have a column ``split`` that says "train" or "test".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flops.core.errors import InvalidInputError
from flops.data.fragments import Fragment, check_site, check_tags, quoted
from flops.data.images import with_split
from flops.data.known import Progress, known_dataset
from flops.data.partitioning import Indices, Partition, dirichlet, iid, shards

if TYPE_CHECKING:
    import pyarrow as pa

_TEST = "-test"


class Target(Protocol):
    """Where the data are put: a `DataClient`, or several of them as one."""

    def put(self, table: "pa.Table", tags: Iterable[str], site: str, *, allow_metrics: bool) -> Fragment: ...


def tags_of_test_split(tags: Iterable[str]) -> list[str]:
    """The tags under which the test examples of these tags lie: ``mnist-test`` for ``mnist``."""
    return sorted(check_tags(f"{tag}{_TEST}" for tag in tags))


def mock(
    target: Target,
    dataset: str,
    tags: Iterable[str],
    sites: Sequence[str],
    *,
    datasets_dir: Path,
    partition: Partition = "iid",
    alpha: float = 0.5,
    shards_per_site: int = 2,
    test_split: bool = False,
    seed: int = 0,
    num_examples: int | None = None,
    progress: Progress | None = None,
) -> list[Fragment]:
    """Put one fragment of a known data set's training part at each site; every example lies at one site.

    The same arguments again put nothing new. Other arguments under the same tags add to what lies there:
    use a tag of their own, or drop the old fragments first.

    Args:
        alpha: concentration of the Dirichlet partition, see `flops.data.dirichlet`.
        shards_per_site: of the partition by shards, see `flops.data.shards`.
        test_split: spread the test examples over the sites too, all of them, in equal parts that are alike
            whatever the partition; they lie under `tags_of_test_split`. The mean of all sites' accuracies,
            weighted by their test examples, is then the accuracy on the whole test set.
        num_examples: to train on, over all sites together, drawn by ``seed``; None: all.
    Returns: the fragments in the order of ``sites``; then those of the test examples, in the same order.

    Raises:
        InvalidInputError: arguments that do not fit the data set or each other.
        UnavailableError: the data set or the data server is out of reach.
    """
    tags = check_tags(tags)
    sites = [check_site(site) for site in sites]
    if len(set(sites)) != len(sites):
        twice = sorted({site for site in sites if sites.count(site) > 1})
        raise InvalidInputError(f"{quoted(twice)} is named twice - name every site once")
    if partition not in ("iid", "dirichlet", "shards"):
        raise InvalidInputError(f"{quoted([partition])} is no partition - use iid, dirichlet or shards")
    if seed < 0:
        raise InvalidInputError(f"the seed is {seed} - use 0 or more")
    import pyarrow.parquet as pq

    table = pq.read_table(known_dataset(dataset, datasets_dir, progress))
    if num_examples is not None and not 1 <= num_examples <= table.num_rows:
        raise InvalidInputError(
            f"{num_examples} examples of {dataset} were asked for - use 1 to {table.num_rows}"
        )
    if num_examples is not None:
        chosen = np.random.default_rng(seed).permutation(table.num_rows)[:num_examples]
        table = table.take(chosen)
    labels = table.column("label").to_numpy()
    if partition == "iid":
        parts = iid(table.num_rows, len(sites), seed)
    elif partition == "shards":
        parts = shards(labels, len(sites), shards_per_site, seed)
    else:
        parts = dirichlet(labels, len(sites), alpha, seed)
    if not test_split:
        return _put(target, table, tags, sites, parts)
    test = pq.read_table(known_dataset(dataset, datasets_dir, progress, "test"))
    test_parts = iid(test.num_rows, len(sites), seed)
    return [
        *_put(target, with_split(table, "train"), tags, sites, parts),
        *_put(target, with_split(test, "test"), tags_of_test_split(tags), sites, test_parts),
    ]


def _put(
    target: Target, table: "pa.Table", tags: Iterable[str], sites: Sequence[str], parts: Sequence[Indices]
) -> list[Fragment]:
    return [
        target.put(table.take(part), tags, site, allow_metrics=True)
        for site, part in zip(sites, parts, strict=True)
    ]
