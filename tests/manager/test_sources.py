"""Data servers of several nodes as one: real servers, each with a folder of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flops.core.errors import InvalidInputError, NotFoundError
from flops.data.histograms import Histograms
from flops.data.listening import prepare_socket
from flops.data.server import DataServer
from flops.data.store import FragmentStore
from flops.manager.sources import Source, Sources

TOKEN = "t0ken-of-the-tests-and-nobody-else"
TABLE = pa.table({"x": [1.0, 2.0], "label": [0, 1]})


@pytest.fixture
def open_sources(tmp_path: Path) -> Iterator[Callable[..., Sources]]:
    running: list[Any] = []

    def open_(*nodes: str) -> Sources:
        found = []
        for node in nodes:
            folder = tmp_path / (node or "here")
            store = FragmentStore(folder / "data")
            location = prepare_socket(folder / "run" / "s")
            server = DataServer(store, Histograms(store, folder / "histograms.json", 1.0), TOKEN, location)
            running.extend((server.shutdown, store.close))
            found.append(Source(node, location))
        return Sources(found, TOKEN)

    yield open_
    for end in running:
        end()


def test_new_sites_are_spread_and_known_ones_stay_where_they_are(open_sources: Any) -> None:
    with open_sources("n1", "n2") as sources:
        nodes = {site: sources.put_on(None, TABLE, ["t"], site)[0] for site in ("a", "b", "c")}
        assert sorted(nodes.values()) == ["n1", "n1", "n2"]
        more = pa.table({"x": [3.0], "label": [1]})
        assert {site: sources.put_on(None, more, ["t"], site)[0] for site in nodes} == nodes
        listed = [(node, fragment.site) for node, fragment in sources.list(["t"])]
        assert sorted(listed) == sorted((node, site) for site, node in nodes.items() for _ in range(2))


def test_a_node_may_be_named_unless_the_site_is_elsewhere(open_sources: Any) -> None:
    with open_sources("n1", "n2") as sources:
        assert sources.put_on("n2", TABLE, ["t"], "a")[0] == "n2"
        with pytest.raises(InvalidInputError, match="the data of site 'a' lie on node n2, not n1"):
            sources.put_on("n1", TABLE, ["t"], "a")
        with pytest.raises(NotFoundError, match="no node 'mars' holds data - use one of: n1, n2"):
            sources.put_on("mars", TABLE, ["t"], "b")


def test_fragments_are_dropped_wherever_they_are(open_sources: Any) -> None:
    with open_sources("n1", "n2") as sources:
        _, fragment = sources.put_on("n2", TABLE, ["t"], "a")
        sources.put_on("n1", TABLE, ["other"], "b")
        sources.drop(fragment.id)
        assert [one.site for _, one in sources.list([])] == ["b"]
        with pytest.raises(NotFoundError):
            sources.drop(fragment.id)
        sources.drop(tags=["other"])
        assert sources.list([]) == []
