"""What the manager wants of a node: to be a learner. Checked here, word by word, before it means anything."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from flops.core.errors import FlopsError, InvalidInputError
from flops.core.ids import ServiceName, project_id

CONFIG, CA, CERTIFICATE, KEY = "config.json", "project-ca.pem", "cert.pem", "key.pem"
FILES = frozenset({CONFIG, CA, CERTIFICATE, KEY})
MAX_FILE_BYTES = 500_000
MAX_CODE_BYTES = 1 << 30
ANY_HOST = "manager.invalid"
"""Stands for the manager's host in addresses: each node has its own name for it."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LOCK = re.compile(r"[0-9a-f]{32}")
_LEARNER = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_AGGREGATOR = re.compile(rf"grpc\+tls://{re.escape(ANY_HOST)}:([0-9]{{1,5}})")
_MAX_TEXT = 1000
_MAX_TAGS = 1000


@dataclass(frozen=True)
class Assignment:
    """One learner that is wanted here.

    Args:
        digest: of all of this; another one is another attempt. lock: hash of the packages of its environment.
        rounds_total: None: the manager did not say. files: by name; what of the configuration counts is
            taken out of it by `flops.node.configuring`.
    """

    name: ServiceName
    digest: str
    project: str
    learner: str
    owner: str
    team: str | None
    repository: str
    commit: str
    tags: tuple[str, ...]
    site: str
    rounds_total: int | None
    lock: str
    code_sha256: str
    code_bytes: int
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Without the files."""
        content = asdict(self)
        del content["files"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**content, "tags": tuple(content["tags"])})

    @classmethod
    def of(cls, wanted: Any) -> Self:
        """Raises InvalidInputError: it is none."""
        try:
            return cls._of(wanted)
        except FlopsError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(
                f"the manager wants what is no learner ({type(error).__name__}: {str(error)[:100]}) - "
                "are both of the same version?"
            ) from error

    @classmethod
    def _of(cls, wanted: Any) -> Self:
        name, digest = identity(wanted)
        said = wanted["assignment"]
        project = project_id(_text(said, "project"))
        if not name.startswith(f"{project}-") or wanted.get("project", project) != project:
            raise InvalidInputError(f"service {name} is not one of project {project} - it is not started")
        tags = said["tags"]
        if not isinstance(tags, list) or not 0 < len(tags) <= _MAX_TAGS:
            raise InvalidInputError(f"service {name} names no data tags, or too many - it is not started")
        size = said["code_bytes"]
        if not isinstance(size, int) or not 0 <= size <= MAX_CODE_BYTES:
            raise InvalidInputError(
                f"the code of project {project} is said to have {str(size)[:20]} bytes, this node takes "
                f"{MAX_CODE_BYTES} - keep data out of the repository"
            )
        rounds = said.get("rounds_total")
        return cls(
            name=name,
            digest=digest,
            project=project,
            learner=_matching(said, "learner", _LEARNER),
            owner=_text(said, "owner"),
            team=_text(said, "team") if said.get("team") is not None else None,
            repository=_text(said, "repository"),
            commit=_text(said, "commit"),
            tags=tuple(_text({"tag": tag}, "tag") for tag in tags),
            site=_text(said, "site"),
            rounds_total=rounds if isinstance(rounds, int) else None,
            lock=_matching(said, "lock", _LOCK),
            code_sha256=_matching(said, "code_sha256", _DIGEST),
            code_bytes=size,
            files=_files(wanted.get("files", {})),
        )


@dataclass(frozen=True)
class Told:
    """The part of a learner's configuration that the manager decides."""

    token: str
    port: int
    """Of the aggregator, on the manager's host."""
    seed: int
    threads: int | None
    memory_mb: int | None

    @classmethod
    def of(cls, content: bytes) -> Self:
        """Raises InvalidInputError: it cannot be read, or wants what a joined node does not do."""
        try:
            said = json.loads(content)
            found = _AGGREGATOR.fullmatch(str(said["aggregator"]))
            if found is None or not 0 < int(found[1]) < 1 << 16:
                raise InvalidInputError(
                    f"a learner here connects to its manager's host alone, not to "
                    f"'{str(said['aggregator'])[:80]}' - it is not started"
                )
            if said.get("placed") or said.get("virtual") or said.get("worker_socket"):
                raise InvalidInputError(
                    "a joined node has learners of its own data alone, which connect to the root - virtual "
                    "learners and measured clusters run elsewhere"
                )
            return cls(
                token=_text(said, "token"),
                port=int(found[1]),
                seed=_number(said, "seed", 2**32 - 1) or 0,
                threads=_number(said, "threads", 4096),
                memory_mb=_number(said, "memory_mb", 1 << 30),
            )
        except FlopsError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidInputError(
                f"the learner's configuration cannot be read ({type(error).__name__}) - are manager and "
                "node of the same version?"
            ) from error


def identity(wanted: Any) -> tuple[ServiceName, str]:
    """Name and digest: enough to answer that the rest cannot be done.

    Raises:
        InvalidInputError: not even these.
    """
    name = wanted.get("name") if isinstance(wanted, dict) else None
    digest = wanted.get("digest") if isinstance(wanted, dict) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInputError(f"'{str(name)[:70]}' cannot name a service")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise InvalidInputError(f"service {name} has no digest")
    return ServiceName(name), digest


def _files(given: Any) -> dict[str, bytes]:
    if not isinstance(given, dict):
        raise InvalidInputError("the files of a service are no JSON object")
    if unknown := set(given) - FILES:
        raise InvalidInputError(f"'{str(sorted(unknown)[0])[:40]}' is no file of a learner")
    try:
        decoded = {name: base64.b64decode(text, validate=True) for name, text in given.items()}
    except binascii.Error as error:
        raise InvalidInputError(f"a file of a service is not in base64: {error}") from error
    if any(len(content) > MAX_FILE_BYTES for content in decoded.values()):
        raise InvalidInputError(f"a file of a service has more than {MAX_FILE_BYTES} bytes")
    return decoded


def _text(said: Mapping[str, Any], key: str) -> str:
    value = said[key]
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise InvalidInputError(f"'{key}' of an assignment is no text of at most {_MAX_TEXT} characters")
    return value


def _matching(said: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = _text(said, key)
    if not pattern.fullmatch(value):
        raise InvalidInputError(f"'{key}' of an assignment is '{value[:40]}', which it cannot be")
    return value


def _number(said: Mapping[str, Any], key: str, highest: int) -> int | None:
    value = said.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value <= highest:
        raise InvalidInputError(f"'{key}' of a learner is '{str(value)[:20]}', which it cannot be")
    return value
