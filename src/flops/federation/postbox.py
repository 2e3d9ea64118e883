"""The way from an aggregator to the manager: HTTP over its Unix socket, or over TLS from another machine.

Each call has a connection of its own: reports are rare, and either side may be killed between two of them.
"""

import contextlib
import hashlib
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from flops.federation.config import ReportTo

_TIMEOUT_S = 10.0
_RECEIPT_TIMEOUT_S = 300.0
"""For a model that has been sent: the manager writes it to its disk before it answers."""
_PART_BYTES = 1 << 18
_MAX_ANSWER_BYTES = 1 << 20
_REFUSALS = {401, 403, 404, 410}


class RefusedError(OSError):
    """The manager is there and will not take it: the project was removed."""


class Postbox:
    """Posts what belongs to one project; any thread may use it.

    Whatever fails raises OSError, ValueError, KeyError, TypeError or HTTPException, and may be tried again;
    but for `RefusedError`, which it is for good.
    """

    def __init__(self, to: ReportTo) -> None:
        self._to = to

    def post(self, source: str, reports: list[dict[str, Any]]) -> int:
        """Post reports; returns the number of the last one that the manager has."""
        with contextlib.closing(self._connect()) as connection:
            connection.request(
                "POST",
                self._to.url_path,
                body=json.dumps({"source": source, "reports": reports}),
                headers={"Content-Type": "application/json", **self._authorization()},
            )
            return int(json.loads(_answer(connection, HTTPStatus.OK))["accepted"])

    def send_model(self, file: Path, sha256: str, sent: Callable[[], None]) -> None:
        """Send the trained model, a part at a time; the manager checks its digest.

        Args:
            sent: called after each part.
        """
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(file.stat().st_size),
            "X-FLOps-SHA256": sha256,
            **self._authorization(),
        }
        path = self._to.url_path.rpartition("/")[0] + "/model"
        with contextlib.closing(self._connect()) as connection, file.open("rb") as model:
            try:
                connection.request("PUT", path, body=_parts(model, sent), headers=headers)
            except OSError:
                # The manager may have answered before it had read everything: that says more.
                with contextlib.suppress(http.client.ResponseNotReady, ConnectionError, ssl.SSLError):
                    _answer(connection, HTTPStatus.CREATED)
                raise
            connection.sock.settimeout(_RECEIPT_TIMEOUT_S)
            _answer(connection, HTTPStatus.CREATED)

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._to.token}"}

    def _connect(self) -> http.client.HTTPConnection:
        if self._to.url is None:
            return _UnixConnection(self._to.socket or "")
        # No certificate but those that this authority signed, whatever the system trusts.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self._to.ca)
        url = urlsplit(self._to.url)
        return http.client.HTTPSConnection(
            url.hostname or "", url.port, timeout=_TIMEOUT_S, context=context, blocksize=_PART_BYTES
        )


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _parts(model: BinaryIO, sent: Callable[[], None]) -> Iterator[bytes]:
    while part := model.read(_PART_BYTES):
        yield part
        sent()


def _answer(connection: http.client.HTTPConnection, expected: HTTPStatus) -> bytes:
    response = connection.getresponse()
    body = response.read(_MAX_ANSWER_BYTES)
    if response.status in _REFUSALS:
        raise RefusedError(f"it does not know this project any more ({response.status})")
    if response.status != expected:
        raise OSError(f"it answered {response.status} {body[:200]!r}")
    return body


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("manager", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
