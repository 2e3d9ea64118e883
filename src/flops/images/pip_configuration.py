"""The user's pip configuration, read as pip reads it and handed to uv.

uv ignores pip's files and variables; users, companies and air-gapped sites have only those. Read here without
starting pip (0.4 s), in pip's own order (https://pip.pypa.io/en/stable/topics/configuration/): section
``global`` of all files, then section ``install`` of all files, then ``PIP_*`` variables; a later value wins.
"""

import configparser
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flops.core.errors import InvalidInputError

# What an operator may set for uv itself; all else of UV_* would change the meaning of our calls.
_UV_KEPT = frozenset(
    {
        "UV_CACHE_DIR",
        "UV_CONCURRENT_BUILDS",
        "UV_CONCURRENT_DOWNLOADS",
        "UV_CONCURRENT_INSTALLS",
        "UV_DEFAULT_INDEX",
        "UV_EXCLUDE_NEWER",
        "UV_EXTRA_INDEX_URL",
        "UV_FIND_LINKS",
        "UV_HTTP_RETRIES",
        "UV_HTTP_TIMEOUT",
        "UV_INSECURE_HOST",
        "UV_KEYRING_PROVIDER",
        "UV_LINK_MODE",
        "UV_NATIVE_TLS",
        "UV_OFFLINE",
        "UV_PYTHON_INSTALL_DIR",
        "UV_SYSTEM_CERTS",
        "UV_TORCH_BACKEND",
    }
)
# These choose where and how, never what; the lock does not depend on them.
_WITHOUT_INFLUENCE = ("UV_CACHE_DIR", "UV_CONCURRENT_", "UV_HTTP_", "UV_LINK_MODE", "UV_OFFLINE")
_DROPPED = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "PYTHONPATH", "PYTHONHOME")
_SYNONYMS = {"default-timeout": "timeout", "pypi-url": "index-url"}
_TRUE = frozenset({"1", "true", "yes", "on", "t", "y"})


@dataclass(frozen=True)
class PipConfiguration:
    """What pip was told about indexes, certificates and the way to them; empty: the default index."""

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    no_index: bool = False
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    client_cert: str | None = None
    proxy: str | None = None
    timeout_s: int | None = None

    @classmethod
    def from_pip(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        files: tuple[Path, ...] | None = None,
    ) -> "PipConfiguration":
        """Read pip's files and variables.

        Args:
            environment: where ``PIP_*`` and the places of the files come from.
            files: the files to read, least important first; None: those that pip reads.
        Raises:
            InvalidInputError: a file or a value is broken.
        """
        if files is None:
            files = tuple(configuration_files(environment))
        sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
        for file in files:
            parsed = _parse(file)
            for section, values in sections.items():
                if parsed.has_section(section):
                    values.update(_options(parsed.items(section)))
        variables = _options(
            (key[4:].lower(), value) for key, value in environment.items() if key.startswith("PIP_")
        )
        found = {**sections["global"], **sections["install"], **variables}
        return cls(
            index_url=found.get("index-url"),
            extra_index_urls=tuple(found.get("extra-index-url", "").split()),
            find_links=tuple(map(_expanded, found.get("find-links", "").split())),
            no_index=found.get("no-index", "").lower() in _TRUE,
            trusted_hosts=tuple(found.get("trusted-host", "").split()),
            cert=found.get("cert"),
            client_cert=found.get("client-cert"),
            proxy=found.get("proxy"),
            timeout_s=_seconds(found.get("timeout")),
        )

    def uv_environment(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The variables for a uv process: ``environment`` less what misleads uv, and this configuration.

        Variables and not arguments: index URLs may hold passwords, and arguments can be read by every user.
        """
        result = {
            key: value
            for key, value in environment.items()
            if key not in _DROPPED
            and not key.startswith("PIP_")
            and (not key.startswith("UV_") or key in _UV_KEPT or key.startswith("UV_INDEX"))
        }
        result.update(
            UV_PYTHON_DOWNLOADS="never",
            UV_NO_CONFIG="1",
            # As pip does: the best version of all indexes and folders, not the first index that has the name.
            UV_INDEX_STRATEGY="unsafe-best-match",
            NO_COLOR="1",
            # Neither git nor ssh, which fetch requirements, asks anybody: nobody may be there to answer.
            GIT_TERMINAL_PROMPT="0",
            SSH_ASKPASS="false",
            SSH_ASKPASS_REQUIRE="force",
        )
        if self.index_url:
            result["UV_DEFAULT_INDEX"] = self.index_url
        if self.extra_index_urls:
            result["UV_EXTRA_INDEX_URL"] = " ".join(self.extra_index_urls)
        if self.find_links:
            result["UV_FIND_LINKS"] = ",".join(self.find_links)
        if self.trusted_hosts:
            result["UV_INSECURE_HOST"] = " ".join(self.trusted_hosts)
        if self.cert:
            result["SSL_CERT_FILE"] = self.cert
        if self.client_cert:
            result["SSL_CLIENT_CERT"] = self.client_cert
        if self.proxy:
            result["HTTP_PROXY"] = result["HTTPS_PROXY"] = self.proxy
        if self.timeout_s:
            result["UV_HTTP_TIMEOUT"] = str(self.timeout_s)
        return result

    def uv_arguments(self) -> list[str]:
        """What uv takes only as an argument; for the commands ``pip compile`` and ``pip sync``."""
        return ["--no-index"] if self.no_index else []

    def fingerprint(self, environment: Mapping[str, str] = os.environ) -> str:
        """A digest of everything here that can change which versions are chosen (it reveals no password)."""
        uv = {
            key: value
            for key, value in self.uv_environment(environment).items()
            if key.startswith("UV_") and not key.startswith(_WITHOUT_INFLUENCE)
        }
        own = {**asdict(self), "timeout_s": None, "cert": None, "client_cert": None, "proxy": None}
        return hashlib.sha256(json.dumps([own, uv], sort_keys=True).encode()).hexdigest()


def configuration_files(environment: Mapping[str, str]) -> Iterator[Path]:
    """The files that pip reads on Linux, least important first; they need not exist."""
    explicit = environment.get("PIP_CONFIG_FILE")
    if explicit == os.devnull:
        return
    for folder in reversed((environment.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")):
        yield Path(folder) / "pip" / "pip.conf"
    yield Path("/etc/pip.conf")
    home = environment.get("HOME")
    # pip leaves the user's own files out where a file is named and there
    if home and not (explicit and Path(explicit).exists()):
        yield Path(home) / ".pip" / "pip.conf"
        configured = environment.get("XDG_CONFIG_HOME")
        yield (Path(configured) if configured else Path(home) / ".config") / "pip" / "pip.conf"
    yield Path(sys.prefix) / "pip.conf"
    if explicit:
        yield Path(explicit).expanduser()


def _options(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Options under the names that they go by here; an empty one says nothing, as for pip."""
    named = ((key.replace("_", "-"), value.strip()) for key, value in entries)
    return {_SYNONYMS.get(key, key): value for key, value in named if value}


def _expanded(place: str) -> str:
    return str(Path(place).expanduser()) if place.startswith("~") else place


def _parse(file: Path) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise InvalidInputError(
            f"pip's configuration file {file} cannot be read: {str(error).splitlines()[0]} - mend it, "
            "'python -m pip config debug' shows which files there are"
        ) from error
    return parser


def _seconds(text: str | None) -> int | None:
    if not text:
        return None
    try:
        return max(1, int(float(text)))
    except (ValueError, OverflowError):
        raise InvalidInputError(
            f"pip's timeout is '{text[:40]}', which is no number of seconds - mend pip's configuration"
        ) from None
