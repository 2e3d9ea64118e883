"""The way to the manager: outgoing calls over TLS, under the one authority that was compared at joining."""

import os
import platform
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import httpx

import flops
from flops.client.errors import ManagerAwayError, NotAnsweredError, error_of, translated
from flops.core.errors import FailedError, UnavailableError
from flops.node.assignment import Assignment
from flops.node.code import Bounded

WAIT_S = 20.0
"""How long an answer may wait for something new."""
_CONNECT_TIMEOUT_S = 10.0
_TIMEOUT_S = 45.0
_MAX_ANSWER_BYTES = 64 << 20
_PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}


class Manager(Protocol):
    """What a node asks of its manager. All methods raise children of FlopsError."""

    def sync(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Say what is there, and hear what is wanted."""
        ...

    def code(self, assignment: Assignment, into: Path, check: Callable[[], None]) -> None:
        """Write the archive of a project's code; what `check` raises ends the transfer."""
        ...

    def lock(self, project: str) -> str:
        """The text of a project's lock."""
        ...


class Link:
    """See `Manager`; safe from several threads.

    Args:
        ca: PEM text of the only authority to trust; None: this machine's own.
    """

    def __init__(self, url: str, ca: str | None, credential: str = "") -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {credential}"} if credential else {},
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            verify=ssl.create_default_context(cadata=ca) if ca is not None else True,
            # A proxy that is set for the package index must not get the credential.
            trust_env=False,
            limits=httpx.Limits(keepalive_expiry=30.0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def join(self, token: str) -> dict[str, Any]:
        """Become a node, with a join token; returns its name, its owner and its credential."""
        return self._json("POST", "/v1/node/join", {"token": token, **this_machine()})

    def leave(self) -> None:
        self._json("POST", "/v1/node/leave", None)

    def sync(self, report: Mapping[str, Any]) -> dict[str, Any]:
        return self._json("POST", "/v1/node/sync", report)

    def lock(self, project: str) -> str:
        return str(self._json("GET", f"/v1/node/projects/{project}/lock", None).get("text", ""))

    def code(self, assignment: Assignment, into: Path, check: Callable[[], None]) -> None:
        with into.open("wb") as file:
            bounded = Bounded(file, assignment.code_bytes, check)
            with (
                _reaching(self._url),
                self._http.stream("GET", f"/v1/node/projects/{assignment.project}/code") as response,
            ):
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                for part in response.iter_raw(1 << 20):
                    bounded.write(part)
            bounded.ended(assignment.code_sha256)

    def _json(self, method: str, path: str, body: Any) -> dict[str, Any]:
        with _reaching(self._url), self._http.stream(method, path, json=body) as response:
            content = b""
            for part in response.iter_bytes():
                content += part
                if len(content) > _MAX_ANSWER_BYTES:
                    raise FailedError(f"the manager at {self._url} said more than can be taken in")
        # As one that was read at once: how it travelled is undone already.
        wait = {"retry-after": response.headers["retry-after"]} if "retry-after" in response.headers else {}
        whole = httpx.Response(response.status_code, headers=wait, content=content)
        if not whole.is_success:
            raise error_of(whole)
        try:
            answer = whole.json()
        except ValueError as error:
            raise FailedError(f"what answers at {self._url} is no manager") from error
        if not isinstance(answer, dict):
            raise FailedError(f"what answers at {self._url} is no manager")
        return answer


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Raises UnavailableError: the manager was not reached; in words for somebody who cannot start it."""
    try:
        with translated(url):
            yield
    except NotAnsweredError as error:
        raise UnavailableError(f"the manager at {url} did not answer in time") from error
    except ManagerAwayError as error:
        raise UnavailableError(f"the manager at {url} cannot be reached ({error.__cause__})") from error


def this_machine() -> dict[str, Any]:
    """What a manager is told of the machine when it joins."""
    machine = platform.machine()
    return {
        "platform": _PLATFORMS.get(machine, f"linux/{machine}"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000,
        "version": flops.__version__,
    }
