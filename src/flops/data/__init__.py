"""Data: fragments of training data, the server that keeps them at their site, known data sets and
partitions.

A fragment is one immutable table with data tags and a site. It is stored whole or not at all, keeps its
schema metadata to the byte (so that Hugging Face features survive), and is only reachable with the server's
token. The server is a program of its own (``python -m flops.data.server``); everything here talks to it
through `DataClient`.
"""

from flops.data.client import DataClient, Stored
from flops.data.fragments import (
    DEFAULT_SITE,
    Fragment,
    FragmentId,
    check_labels,
    check_site,
    check_tags,
    fragment_id,
)
from flops.data.known import known_dataset
from flops.data.listening import unix_location
from flops.data.mocking import mock, tags_of_test_split
from flops.data.partitioning import Partition, dirichlet, iid, shards
from flops.data.protocol import read_token
from flops.data.tables import read_table

__all__ = [
    "DEFAULT_SITE",
    "DataClient",
    "Fragment",
    "FragmentId",
    "Partition",
    "Stored",
    "check_labels",
    "check_site",
    "check_tags",
    "dirichlet",
    "fragment_id",
    "iid",
    "known_dataset",
    "mock",
    "read_table",
    "read_token",
    "shards",
    "tags_of_test_split",
    "unix_location",
]
