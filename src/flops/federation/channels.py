"""Transport connections to aggregators, which the members of one process share."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.flight as flight

from flops.federation.config import Tls

# A gRPC server, which pyarrow lets nobody configure, hangs up on clients that ping more often than every
# 300 s while nothing else is said. So a message of ours keeps the connection in use and finds it dead: where
# pings are on, TCP gives it `keepalive_timeout` to be acknowledged.
_KEEPALIVE = [("grpc.keepalive_time_ms", 320_000), ("grpc.keepalive_timeout_ms", 20_000)]


@dataclass
class _Channel:
    client: Any
    users: int = 0


class Channels:
    """One connection to each aggregator, for as long as somebody uses it; any thread may ask.

    Every client of its own would cost a thousand members a thousand connections, and a thread for each.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Channel] = {}
        """Those that newcomers get, by address."""
        self._used: dict[int, _Channel] = {}

    def take(self, address: str, tls: Tls | None) -> Any:
        """A Flight client, which goes back to `give_back`."""
        with self._lock:
            channel = self._open.get(address)
            if channel is None:
                tls = tls or Tls()
                client = flight.FlightClient(
                    address,
                    tls_root_certs=_content(tls.ca),
                    cert_chain=_content(tls.cert),
                    private_key=_content(tls.key),
                    generic_options=_KEEPALIVE,
                )
                channel = self._open[address] = self._used[id(client)] = _Channel(client)
            channel.users += 1
            return channel.client

    def give_back(self, client: Any, *, lost: bool) -> None:
        """The calls that were made through it have ended.

        Args:
            lost: the connection is gone. Whoever asks next gets a fresh one: gRPC itself would wait longer
                and longer before it tried again.
        """
        with self._lock:
            channel = self._used[id(client)]
            channel.users -= 1
            unused = channel.users == 0
            if lost or unused:
                self._open = {key: value for key, value in self._open.items() if value is not channel}
            if unused:
                del self._used[id(client)]
        if unused:
            client.close()


def _content(file: str | None) -> bytes | None:
    return Path(file).read_bytes() if file else None
