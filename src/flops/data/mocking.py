"""Mock data: a known data set spread over sites, as if each had collected its part."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flops.core.errors import InvalidInputError
from flops.data.client import DataClient
from flops.data.fragments import Fragment, check_site, check_tags, quoted
from flops.data.known import Progress, known_dataset
from flops.data.partitioning import Partition, dirichlet, iid


def mock(
    client: DataClient,
    dataset: str,
    tags: Iterable[str],
    sites: Sequence[str],
    *,
    datasets_dir: Path,
    partition: Partition = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    num_examples: int | None = None,
    progress: Progress | None = None,
) -> list[Fragment]:
    """Put one fragment of a known data set's training part at each site; every example lies at one site.

    The same arguments again put nothing new. Other arguments under the same tags add to what lies there:
    use a tag of their own, or drop the old fragments first.

    Args:
        alpha: concentration of the Dirichlet partition, see `flops.data.dirichlet`.
        num_examples: over all sites together, drawn by ``seed``; None: all.
    Returns: the fragments in the order of ``sites``.

    Raises:
        InvalidInputError: arguments that do not fit the data set or each other.
        UnavailableError: the data set or the data server is out of reach.
    """
    tags = check_tags(tags)
    sites = [check_site(site) for site in sites]
    if len(set(sites)) != len(sites):
        twice = sorted({site for site in sites if sites.count(site) > 1})
        raise InvalidInputError(f"{quoted(twice)} is named twice - name every site once")
    if partition not in ("iid", "dirichlet"):
        raise InvalidInputError(f"{quoted([partition])} is no partition - use iid or dirichlet")
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
    if partition == "iid":
        parts = iid(table.num_rows, len(sites), seed)
    else:
        parts = dirichlet(table.column("label").to_numpy(), len(sites), alpha, seed)
    return [
        client.put(table.take(part), tags, site, allow_metrics=True)
        for site, part in zip(sites, parts, strict=True)
    ]
