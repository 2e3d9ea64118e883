"""Partitions: which example of a known data set lies at which site. Seeded, and nothing else decides."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flops.core.errors import InvalidInputError

Partition = Literal["iid", "dirichlet", "shards"]
Indices = npt.NDArray[np.int64]


def iid(num_examples: int, num_sites: int, seed: int) -> list[Indices]:
    """Shuffle and cut into parts whose sizes differ by at most one.

    Returns: for each site the (n_i,) indices of its examples; together every index once.

    Raises:
        InvalidInputError: fewer examples than sites, or no sites.
    """
    _check(num_examples, num_sites)
    order = np.random.default_rng(seed).permutation(num_examples)
    return [part.astype(np.int64) for part in np.array_split(order, num_sites)]


def dirichlet(labels: npt.ArrayLike, num_sites: int, alpha: float, seed: int) -> list[Indices]:
    """Give every site the same number of examples, but its own mixture of labels.

    Site after site draws its mixture q ~ Dirichlet(alpha * C * p), where p (C,) is the share of each label
    among all examples (for balanced labels: the symmetric Dirichlet(alpha)), and then its examples without
    replacement, by q. Labels that ran out share their part of q among the others; a site whose whole
    mixture ran out takes what is left in proportion. Sizes differ by at most one, so every site has an
    example. Small alpha: few labels a site; large: IID.

    Args:
        labels: (n,) any values that numpy can sort.
        alpha: concentration, finite and positive.
    Returns: for each site the (n_i,) indices of its examples, shuffled; together every index once.

    Raises:
        InvalidInputError: fewer examples than sites, or alpha out of bounds.
    Source:
        Hsu, Qi, Brown 2019, arXiv:1909.06335, section 3 (with the factor C, so that alpha means what it
        does in most later papers).
    """
    values: npt.NDArray[Any] = np.asarray(labels)
    _check(len(values), num_sites)
    if not (np.isfinite(alpha) and 1e-6 <= alpha <= 1e9):
        raise InvalidInputError(f"alpha is {alpha} - use a number from 1e-6 to 1e9")
    random = np.random.default_rng(seed)
    _, codes = np.unique(values, return_inverse=True)
    totals = np.bincount(codes)
    order = random.permutation(len(codes))
    queues = np.split(order[np.argsort(codes[order], kind="stable")], np.cumsum(totals)[:-1])
    concentration = alpha * totals / totals.mean()
    taken = np.zeros_like(totals)
    parts = []
    for size in [len(part) for part in np.array_split(order, num_sites)]:
        mixture = _mixture(random, concentration)
        counts = _draw(random, mixture, totals - taken, size)
        chosen = [
            queue[start : start + count] for queue, start, count in zip(queues, taken, counts, strict=True)
        ]
        taken += counts
        parts.append(random.permutation(np.concatenate(chosen)).astype(np.int64))
    return parts


def shards(labels: npt.ArrayLike, num_sites: int, shards_per_site: int, seed: int) -> list[Indices]:
    """Sort by label, cut into ``num_sites * shards_per_site`` equal shards, deal them out at random.

    Sizes of shards differ by at most one, those of sites by at most ``shards_per_site``. A shard that is no
    larger than the rarest label holds one or two labels, so with two shards most sites see two labels only.

    Args:
        labels: (n,) any values that numpy can sort.
    Returns: for each site the (n_i,) indices of its examples, shuffled; together every index once.

    Raises:
        InvalidInputError: fewer examples than shards, or no shards.
    Source:
        McMahan et al. 2017, arXiv:1602.05629, section 3: the "pathological non-IID partition", 200 shards of
        MNIST and two for each client.
    """
    values: npt.NDArray[Any] = np.asarray(labels)
    _check(len(values), num_sites)
    if shards_per_site < 1:
        raise InvalidInputError(f"{shards_per_site} shards a site were asked for - use 1 or more")
    num_shards = num_sites * shards_per_site
    if len(values) < num_shards:
        raise InvalidInputError(
            f"{len(values)} examples cannot be cut into {num_shards} shards ({shards_per_site} for each of "
            f"{num_sites} sites) - use fewer shards or sites, or more examples"
        )
    random = np.random.default_rng(seed)
    order = random.permutation(len(values))
    cut = np.array_split(order[np.argsort(values[order], kind="stable")], num_shards)
    dealt = random.permutation(num_shards).reshape(num_sites, shards_per_site)
    return [
        random.permutation(np.concatenate([cut[shard] for shard in hand])).astype(np.int64) for hand in dealt
    ]


def _mixture(
    random: "np.random.Generator", concentration: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    mixture = random.dirichlet(concentration)
    if not np.isfinite(mixture).all() or mixture.sum() <= 0:
        # All gamma variates underflowed: in the limit of small alpha a site has one label.
        mixture = np.zeros_like(concentration)
        share = concentration / concentration.sum()
        mixture[random.choice(len(concentration), p=share)] = 1.0
    return np.asarray(mixture / mixture.sum(), dtype=np.float64)


def _draw(
    random: "np.random.Generator",
    mixture: npt.NDArray[np.float64],
    left: npt.NDArray[np.int64],
    size: int,
) -> npt.NDArray[np.int64]:
    """How many examples of each label a site takes: ``size`` in all, at most ``left``."""
    counts = np.zeros_like(left)
    while missing := size - int(counts.sum()):
        room = left - counts
        weights = np.where(room > 0, mixture, 0.0)
        if weights.sum() <= 0:
            counts += random.multivariate_hypergeometric(room, missing)
            break
        counts += np.minimum(random.multinomial(missing, weights / weights.sum()), room)
    return counts


def _check(num_examples: int, num_sites: int) -> None:
    if num_sites < 1:
        raise InvalidInputError("there is no site to give data to - name at least one")
    if num_examples < num_sites:
        raise InvalidInputError(
            f"{num_examples} examples cannot be spread over {num_sites} sites, each with at least one - "
            "use fewer sites or more examples"
        )
