"""The data servers of all nodes as one: which node holds what, and where something new belongs."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flops.core.errors import InvalidInputError, NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

    from flops.data import Fragment


SOURCES = "sources"
"""Argument of steps: the data servers, as fields of `Source`."""


@dataclass(frozen=True)
class Source:
    """One data server: its node (empty: this machine), and how it is reached from here."""

    node: str
    location: str
    ca: str | None = None
    """File with the authority that its certificate is signed by."""
    cert: str | None = None
    key: str | None = None
    """Files with which the manager proves itself to it."""


class Sources:
    """Clients of several data servers. Closed at the end of a ``with``; used by one thread.

    All methods raise what `flops.data.DataClient` raises.
    """

    def __init__(self, sources: Sequence[Source], token: str) -> None:
        from flops.data import DataClient

        self._clients = {
            source.node: DataClient(
                source.location,
                token,
                tls_ca=_path(source.ca),
                tls_cert=_path(source.cert),
                tls_key=_path(source.key),
            )
            for source in sources
        }
        self._known: dict[str, set[str]] | None = None
        self.placed: dict[str, str] = {}
        """The nodes of the fragments that were put, by their ids."""

    def list(self, tags: Iterable[str], site: str | None = None) -> "list[tuple[str, Fragment]]":
        """Fragments with any of the tags, each with its node."""
        wanted = list(tags)
        return [
            (node, fragment)
            for node, client in self._clients.items()
            for fragment in client.list(wanted, site)
        ]

    def node_of(self, site: str) -> str:
        """Where the data of a site lie; of a new one: where the fewest sites are.

        Raises:
            InvalidInputError: on several nodes.
        """
        if len(self._clients) == 1:
            return next(iter(self._clients))
        sites = self._sites()
        holding = [node for node, known in sites.items() if site in known]
        if len(holding) > 1:
            raise InvalidInputError(
                f"site '{site}' has data on several nodes ({', '.join(holding)}) - a learner trains on one "
                "node: put them under different sites"
            )
        return holding[0] if holding else min(sites, key=lambda node: (len(sites[node]), node))

    def put(self, table: "pa.Table", tags: Iterable[str], site: str, *, allow_metrics: bool) -> "Fragment":
        """As `DataClient.put`, on the site's node."""
        return self._put(self.node_of(site), table, tags, site, allow_metrics=allow_metrics)

    def put_on(
        self, node: str | None, table: "pa.Table", tags: Iterable[str], site: str, **options: Any
    ) -> "tuple[str, Fragment]":
        """As `put`, where the node may be named; answers it too.

        Raises:
            InvalidInputError: the site's data lie on another node.
            NotFoundError: there is no such node.
        """
        if node is not None and node not in self._clients:
            known = ", ".join(name or "this machine" for name in self._clients)
            raise NotFoundError(f"no node '{node[:80]}' holds data - use one of: {known}")
        there = self.node_of(site)
        if node not in (None, there) and site in self._sites()[there]:
            raise InvalidInputError(
                f"the data of site '{site}' lie on node {there}, not {node} - use another site"
            )
        chosen = there if node is None else node
        return chosen, self._put(chosen, table, tags, site, **options)

    def drop(self, fragment: str | None = None, *, tags: Iterable[str] = ()) -> None:
        """Drop a fragment by id, or all that carry one of the tags.

        Raises:
            NotFoundError: no node has such a fragment.
        """
        if fragment is None:
            for client in self._clients.values():
                client.drop(tags=list(tags))
            return
        for number, client in enumerate(self._clients.values(), start=1):
            try:
                client.drop(fragment)
                return
            except NotFoundError:
                if number == len(self._clients):
                    raise

    def histogram(self, tags: Sequence[str], site: str, epsilon: float) -> Mapping[str, int]:
        """As `DataClient.histogram`, of the site's node."""
        return self._clients[self.node_of(site)].histogram(tags, site, epsilon)

    def _put(
        self, node: str, table: "pa.Table", tags: Iterable[str], site: str, **options: Any
    ) -> "Fragment":
        fragment = self._clients[node].put(table, tags, site, **options)
        self.placed[fragment.id] = node
        if self._known is not None:
            self._known[node].add(site)
        return fragment

    def _sites(self) -> dict[str, set[str]]:
        if self._known is None:
            self._known = {
                node: {fragment.site for fragment in client.list([])}
                for node, client in self._clients.items()
            }
        return self._known

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for client in self._clients.values():
                stack.callback(client.close)


def _path(file: str | None) -> Path | None:
    return Path(file) if file is not None else None
