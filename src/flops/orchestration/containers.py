"""What the adapters that drive Docker engines share: the engine's API in our errors, whose things are
whose on an engine that others use too, and how a container of ours is confined.

`Engine` may be used from any thread. Nothing here keeps state.
"""

import hashlib
import io
import json
import re
import socket
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker
import requests
import urllib3
from docker.errors import APIError, DockerException

from flops.core.disk import DiskFullError
from flops.core.errors import (
    ConflictError,
    FailedError,
    FlopsError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
)
from flops.orchestration.ending import Verdict, describe_exit, judge
from flops.orchestration.port import USER_ID, ServiceSpec

USER = f"{USER_ID}:{USER_ID}"

MAX_PROCESSES = 4096
"""Of a container, threads included."""

TMP_BYTES = 64_000_000
"""Of a container's ``/tmp``, which lies in its memory. Programs may be run from it: compilers of user code
(numba, torch) do that."""

LOG_OPTIONS = {"max-size": "5m", "max-file": "2"}
"""Of the engine's own log files of a container."""

DEFAULT_ENVIRONMENT = {"HOME": "/tmp"}  # noqa: S108 - the only place that a service of ours can write to
"""What every service finds in its environment, unless its spec says otherwise."""

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_TIMEOUT_S = 60.0
_PULL_SILENCE_S = 300.0
_HOME = re.compile(r"[a-z0-9]{1,16}")
_FULL = ("no space left on device", "disk quota exceeded")
_PERMANENT = (
    "manifest unknown",
    "not found",
    "no matching manifest",
    "unauthorized",
    "authentication required",
    "denied",
    "invalid reference",
    "does not exist",
    "unsupported",
)


class _Client(docker.APIClient):
    """The SDK's, which would wait for ever for a pull that has come to a standstill."""

    def post(self, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        if str(url).endswith("/images/create"):
            kwargs["timeout"] = _PULL_SILENCE_S
        return super().post(url, *args, **kwargs)


class Engine:
    """One Docker engine, its errors in ours.

    Args:
        url: such as ``unix:///var/run/docker.sock``.
        timeout_s: of one request; pulling may take as long as there is progress.
    Raises:
        UnavailableError: it does not answer.
    """

    def __init__(self, url: str, timeout_s: float = _TIMEOUT_S) -> None:
        self.url = url
        with self.asking("no service can run"):
            self.api: docker.APIClient = _Client(base_url=url, version="auto", timeout=int(timeout_s))

    @contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Around requests to the engine.

        Args:
            what: it is about, for the words of an error: such as ``service p-1-agent-1 cannot start``.
        Raises:
            NotFoundError, ConflictError, InvalidInputError, FailedError: the engine said so.
            UnavailableError: it does not answer, or has no space left.
        """
        self._knock(what)
        try:
            yield
        except (DockerException, requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise translated(error, self.url, what) from error

    def _knock(self, what: str) -> None:
        """Find out that nobody answers before the SDK does, which leaves a socket open then."""
        if self.url.startswith("unix://"):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(_TIMEOUT_S)
                try:
                    probe.connect(self.url.removeprefix("unix://"))
                except OSError as error:
                    raise _does_not_answer(self.url, what, error.strerror or str(error)) from error

    def platform(self) -> str:
        """What it runs, such as ``linux/amd64``."""
        with self.asking("the platform of the engine"):
            return platform_of(self.api.info())

    def have_image(self, image: str, platform: str) -> None:
        """Pull an image unless it is there.

        Registries that want a login get it from docker's own configuration of this user, credential
        helpers included.

        Raises:
            FailedError: there is no such image, we may not have it, or it is for another platform.
            UnavailableError: its registry does not answer, or there is no space left.
        """
        found = self._image(image)
        if found is None:
            self._pull(image, platform)
            found = self._image(image)
        if found is None:
            raise FailedError(f"image {image} was pulled and is gone again - deploy anew")
        made_for = f"{found['Os']}/{found['Architecture']}"
        if made_for != platform:
            raise FailedError(
                f"image {image} is for {made_for}, the engine at {self.url} runs {platform}"
                " - build it for that too"
            )

    def _image(self, image: str) -> dict[str, Any] | None:
        try:
            with self.asking(f"image {image}"):
                found: dict[str, Any] = self.api.inspect_image(image)  # type: ignore[no-untyped-call]
                return found
        except NotFoundError:
            return None

    def _pull(self, image: str, platform: str) -> None:
        try:
            with self.asking(f"image {image}"):
                for line in self.api.pull(image, stream=True, decode=True):
                    if (why := line.get("error")) is not None:
                        raise _cannot_pull(image, platform, why)
        except (NotFoundError, FailedError) as error:
            cause = error.__cause__
            if not isinstance(cause, APIError):
                raise
            raise _cannot_pull(image, platform, str(cause.explanation or cause)) from cause

    def close(self) -> None:
        self.api.close()


def translated(error: Exception, url: str, what: str) -> FlopsError:
    """Our error for one of the SDK's."""
    if isinstance(error, APIError) and error.response is not None:
        why = str(error.explanation or error.response.reason).strip().rstrip(".")
        if any(words in why.lower() for words in _FULL):
            return DiskFullError(
                f"{what}: no space is left where the Docker engine at {url} keeps its data - free some there"
            )
        kinds: Mapping[int, type[FlopsError]] = {
            400: InvalidInputError,
            404: NotFoundError,
            409: ConflictError,
        }
        kind = kinds.get(error.response.status_code, FailedError)
        return kind(f"{what}: {why} - that is what the Docker engine at {url} says")
    return _does_not_answer(url, what, _root_cause(error))


def _does_not_answer(url: str, what: str, why: str) -> UnavailableError:
    advice = "start it ('systemctl start docker'), or name another one"
    if "Permission denied" in why:
        advice = "join the group 'docker', or name another one"
    return UnavailableError(f"{what}: the Docker engine at {url} does not answer ({why}) - {advice}")


def _root_cause(error: BaseException) -> str:
    """The innermost reason: the SDK's own words wrap it five times."""
    innermost: BaseException = error
    seen = {id(error)}
    while (inner := innermost.__cause__ or innermost.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        innermost = inner
    if isinstance(innermost, OSError) and innermost.strerror:
        return innermost.strerror
    return str(innermost) or type(innermost).__name__


def _cannot_pull(image: str, platform: str, why: str) -> FlopsError:
    words = why.lower()
    if any(full in words for full in _FULL):
        return DiskFullError(
            f"image {image} cannot be pulled: no space is left for it on the engine's disk - free some there"
        )
    if "no matching manifest" in words:
        return FailedError(f"image {image} is not made for {platform} ({why}) - build it for that too")
    if any(permanent in words for permanent in _PERMANENT):
        return FailedError(
            f"image {image} cannot be pulled: {why} - check its name, and 'docker login' for its registry"
        )
    return UnavailableError(f"image {image} cannot be pulled now: {why} - check its registry")


# names
@dataclass(frozen=True)
class Names:
    """The names of what one FLOPS_HOME has on an engine.

    Args:
        home: tells it from others; 1 to 16 of a-z and 0-9.
    Raises:
        InvalidInputError: it is something else.
    """

    home: str

    def __post_init__(self) -> None:
        if not _HOME.fullmatch(self.home):
            raise InvalidInputError(f"'{self.home[:70]}' cannot name a home - use at most 16 of a-z and 0-9")

    def of(self, *parts: str) -> str:
        """``flops-HOME-...``, which is neither too long nor wrong for anything that Docker names."""
        return "-".join(("flops", self.home, *parts))

    def labels(self, **more: str) -> dict[str, str]:
        """``flops.home``, and one ``flops.KEY`` for each of ``more``."""
        return {"flops.home": self.home} | {f"flops.{key}": value for key, value in more.items()}

    def labels_of(self, spec: ServiceSpec) -> dict[str, str]:
        return self.labels(service=spec.name, role=spec.role, project=spec.project)

    def mine(self) -> dict[str, Any]:
        """The engine's filter for everything that carries our label."""
        return {"label": f"flops.home={self.home}"}


def home_id(folder: Path) -> str:
    """A name for a FLOPS_HOME (`Names.home`): the same for the same folder."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def fingerprint(spec: ServiceSpec) -> str:
    """Equal for equal specs. A digest: it gives away nothing that could not be guessed anyway."""
    value = {
        name: getattr(spec, name)
        for name in spec.__dataclass_fields__
        if name not in ("files", "volumes", "environment", "directory")
    } | {
        "files": sorted((file.name, hashlib.sha256(file.content).hexdigest()) for file in spec.files),
        "volumes": sorted((volume.name, volume.path) for volume in spec.volumes),
        "environment": sorted(spec.environment.items()),
        "directory": None if spec.directory is None else str(spec.directory),
    }
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# what a service is given
def environment_of(spec: ServiceSpec) -> list[str]:
    """As ``KEY=value``. Whoever may ask the engine can read it: secrets of ours travel as files."""
    return [f"{key}={value}" for key, value in {**DEFAULT_ENVIRONMENT, **spec.environment}.items()]


def memory_bytes(spec: ServiceSpec) -> int | None:
    return None if spec.memory_mb is None else spec.memory_mb * 1_000_000


def nano_cpus(spec: ServiceSpec, cpus: int) -> int | None:
    """For a machine with so many: who may keep more busy than there are may keep all busy."""
    return None if spec.cpus is None else int(min(spec.cpus, cpus) * 1_000_000_000)


def cpu_shares(spec: ServiceSpec) -> int:
    """The weight of a container's processes among those of others, 1024 as a rule: as the kernel weighs
    `ServiceSpec.nice`, a quarter more for each step.
    """
    return max(2, round(1024 * 1.25**-spec.nice))


def images_only(spec: ServiceSpec) -> str:
    """The image of a service.

    Raises:
        InvalidInputError: it has none, or is to be reached from outside without any network.
    """
    if spec.image is None:
        raise InvalidInputError(
            f"service {spec.name} has no image, and this orchestrator runs nothing else - name one"
        )
    if spec.publish and spec.network == "none":
        raise InvalidInputError(
            f"service {spec.name} is published and has no network - give it the network of its project"
        )
    return spec.image


@dataclass(frozen=True)
class Entry:
    """A folder (no content) or a file in a `tarball`; owned by `USER_ID`."""

    path: str
    mode: int
    content: bytes | None = None


def tarball(entries: Sequence[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            member = tarfile.TarInfo(entry.path)
            member.uid = member.gid = USER_ID
            member.mode = entry.mode
            if entry.content is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                member.size = len(entry.content)
                tar.addfile(member, io.BytesIO(entry.content))
    return buffer.getvalue()


# what became of a service
def platform_of(info: Mapping[str, Any]) -> str:
    """From what an engine says of itself, or of a node (``linux``, ``x86_64``)."""
    architecture = str(info["Architecture"])
    return f"{info['OSType']}/{_ARCHITECTURES.get(architecture, architecture)}"


def exit_code_of(code: int) -> int:
    """The engine's exit code as ours: its init hands on 128 + N for a process that signal N killed."""
    return 128 - code if 128 < code <= 128 + 64 else code


def judge_container(
    spec: ServiceSpec,
    exit_code: int | None,
    *,
    out_of_memory: bool,
    restarts: int,
    stopping: bool,
    backoff_s: float,
    quick_ends: int | None = None,
) -> Verdict:
    """`judge`, with the memory limit as the reason where that is what killed the service."""
    verdict = judge(
        spec, exit_code, restarts=restarts, stopping=stopping, backoff_s=backoff_s, quick_ends=quick_ends
    )
    if not out_of_memory or exit_code in (None, 0) or stopping:
        return verdict
    assert exit_code is not None
    what = describe_exit(exit_code)
    return replace(verdict, reason=verdict.reason.replace(what, describe_end(spec, exit_code, True), 1))


def describe_end(spec: ServiceSpec, exit_code: int, out_of_memory: bool) -> str:
    """`describe_exit`, for a container that may have reached its memory limit."""
    if not out_of_memory:
        return describe_exit(exit_code)
    limit = "the machine's memory" if spec.memory_mb is None else f"its memory limit ({spec.memory_mb} MB)"
    if exit_code == -9:
        return f"killed by {limit}"
    return f"{describe_exit(exit_code)} after a process of it was killed by {limit}"


def last_lines(log: bytes, tail_bytes: int) -> str:
    """The last whole lines of a log, at most ``tail_bytes``."""
    tail = log[max(0, len(log) - max(0, tail_bytes)) :]
    if len(tail) < len(log):
        _, newline, whole = tail.partition(b"\n")
        tail = whole if newline else tail
    return tail.decode(errors="replace")
