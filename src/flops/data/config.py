"""What a data server is told: on its command line, or, where it runs in a container, in one private file.

Fields are called like the options of the command line.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from flops.core.errors import InvalidInputError
from flops.data.histograms import DEFAULT_BUDGET
from flops.data.protocol import check_token
from flops.data.writing import Limits

_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True)
class DataServerConfig:
    """Everything a data server needs to know; it listens at ``socket``, at ``listen``, or at both."""

    root: str
    """Folder of the fragments."""
    token: str = field(repr=False)
    """Of all callers."""
    socket: str | None = None
    """Unix socket, in a folder of mode 700."""
    listen: str | None = None
    """``grpc+tls://HOST:PORT``, or plain ``grpc://`` on loopback."""
    tls_cert: str | None = None
    """PEM file of the certificate chain of ``listen``."""
    tls_key: str | None = None
    """PEM file of its private key."""
    tls_ca: str | None = None
    """PEM file of the authority that callers of ``listen`` must be certified by; None: a token is enough."""
    ready_file: str | None = None
    """Written when the server listens, removed when it ends."""
    max_fragment_bytes: int = _LIMITS.max_fragment_bytes
    """Of decoded data."""
    reserve_bytes: int = _LIMITS.reserve_bytes
    """Disk space to leave free."""
    privacy_budget: float = DEFAULT_BUDGET
    """Epsilon that all histograms of a fragment's labels may cost together."""

    def __post_init__(self) -> None:
        check_token(self.token)
        if self.socket is None and self.listen is None:
            raise InvalidInputError("the data server has nowhere to listen - give --socket or --listen")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidInputError("a certificate and its key go together - give --tls-cert and --tls-key")
        if self.tls_ca is not None and not self.encrypted:
            raise InvalidInputError("certificates of callers need TLS - give --listen grpc+tls://HOST:PORT")
        if self.encrypted and self.tls_cert is None:
            raise InvalidInputError(f"'{self.listen}' needs --tls-cert and --tls-key")

    @property
    def encrypted(self) -> bool:
        """Whether the network location is."""
        return (self.listen or "").startswith("grpc+tls:")

    def to_json(self) -> str:
        """The text of the file that `read` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises: InvalidInputError: the file is missing or does not fit."""
        try:
            return cls(**_checked(json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInputError(
                f"the data server's configuration '{path}' cannot be used: {error} - the manager writes it"
            ) from error


def _checked(content: Any) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise TypeError("it is no JSON object")
    for one in fields(DataServerConfig):
        value = content.get(one.name)
        numbers = {"max_fragment_bytes": int, "reserve_bytes": int, "privacy_budget": int | float}
        kind = numbers.get(one.name, str)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise TypeError(f"{one.name} has a value of another kind")
    return content
