"""References: the names by which images are asked for, read by the rules that docker has."""

import ipaddress
import re
from dataclasses import dataclass, replace

from flops.core.errors import InvalidInputError

PUBLIC_HUB = "docker.io"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_CHARS = 255


@dataclass(frozen=True)
class Reference:
    """An image (or artifact) in a registry.

    Raises:
        InvalidInputError: a part breaks the rules.
    """

    host: str
    """Such as ``registry.example:5000``; ``docker.io`` for the public hub."""
    repository: str
    tag: str | None = None
    digest: str | None = None
    """Where both are given, the digest decides which image is meant."""

    def __post_init__(self) -> None:
        check_host(self.host)
        check_repository(self.repository)
        if len(self.name) > _MAX_NAME_CHARS:
            raise InvalidInputError(
                f"the image name '{self.name[:60]}...' has {len(self.name)} characters, "
                f"{_MAX_NAME_CHARS} are allowed"
            )
        if self.tag is not None and not _TAG.fullmatch(self.tag):
            raise InvalidInputError(
                f"'{self.tag[:80]}' is not a tag - use letters, digits, '.', '_' and '-', 128 at most"
            )
        if self.digest is not None and not _DIGEST.fullmatch(self.digest):
            raise InvalidInputError(
                f"'{self.digest[:80]}' is not a digest - write it as sha256:<64 of 0-9a-f>"
            )

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read ``[host[:port]/]path[:tag][@sha256:...]``.

        What comes before the first slash is a host when it has a dot, a colon or a capital letter, or is
        ``localhost``; without a host the image is the public hub's, and one word there stands for
        ``library/word``. Without tag and digest the tag is ``latest``.

        Raises:
            InvalidInputError: it is not a reference.
        """
        rest, has_digest, digest = text.partition("@")
        first, slash, path = rest.partition("/")
        if slash and (first == "localhost" or re.search(r"[.:A-Z]", first)):
            host = first
        else:
            host, path = PUBLIC_HUB, rest
        path, has_tag, tag = path.partition(":")
        if host in ("index.docker.io", "registry-1.docker.io"):
            host = PUBLIC_HUB
        if host == PUBLIC_HUB and "/" not in path:
            if _ID.fullmatch(path):
                raise InvalidInputError(
                    f"'{text[:80]}' is an image's id, not its name - write repository@sha256:..."
                )
            path = f"library/{path}"
        if not has_tag and not has_digest:
            has_tag, tag = ":", "latest"
        try:
            return cls(host, path, tag if has_tag else None, digest if has_digest else None)
        except InvalidInputError as error:
            raise InvalidInputError(f"'{text[:120]}' does not name an image: {error}") from None

    @property
    def name(self) -> str:
        """Host and repository."""
        return f"{self.host}/{self.repository}"

    @property
    def target(self) -> str:
        """What the registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    def with_tag(self, tag: str) -> "Reference":
        """Another image of the same repository, by tag."""
        return replace(self, tag=tag, digest=None)

    def with_digest(self, digest: str) -> "Reference":
        """Another image of the same repository, by digest alone."""
        return replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        return f"{self.name}{tag}" + (f"@{self.digest}" if self.digest is not None else "")


def parse_place(text: str) -> tuple[str, str]:
    """Read ``host[:port][/prefix]``, where images are to go; gives host and prefix (which may be empty).

    Raises:
        InvalidInputError: it is no such place.
    """
    host, _, prefix = text.partition("/")
    prefix = prefix.rstrip("/")
    return check_host(host), check_repository(prefix) if prefix else ""


def check_host(text: str) -> str:
    """The host, if it can name a registry: ``name[:port]``, ``address[:port]`` or ``[ipv6][:port]``.

    Raises:
        InvalidInputError: it cannot.
    """
    match = _HOST.fullmatch(text)
    if match is None or len(text) > _MAX_NAME_CHARS or int(match["port"] or 0) > 65535:
        raise InvalidInputError(f"'{text[:80]}' is not a registry - write it like registry.example:5000")
    return text


def check_repository(text: str) -> str:
    """The path of a repository, if it is one.

    Raises:
        InvalidInputError: it is not.
    """
    if len(text) > _MAX_NAME_CHARS or not _REPOSITORY.fullmatch(text):
        raise InvalidInputError(
            f"'{text[:80]}' is not a repository - use lower case letters and digits, "
            "joined by '/', '.', '_' or '-'"
        )
    return text


def is_loopback(host: str) -> bool:
    """Whether a registry's host is this very machine, so that nobody listens on the way."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
