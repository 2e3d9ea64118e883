"""Debian's mirrors as this machine's own apt knows them, turned to a suite that may be another one.

Owns: reading ``/etc/apt/sources.list`` and ``sources.list.d`` in both of their forms, and writing what
applies to a suite in the newer one. Nothing is fetched here, and no mirror is known here: what apt trusts
(its keys, its proxy, its passwords) is what is trusted.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from flops.core.errors import InvalidInputError

APT = Path("/etc/apt")
_SUITE = re.compile(r"[a-z][a-z0-9-]{0,40}")
_PARTS = ("", "-updates", "-security")
_WITHOUT_PARTS = frozenset({"sid", "unstable", "testing", "experimental"})
"""Suites that are their own updates."""
_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>.*)")
_DROPPED = frozenset({"types", "uris", "suites", "components", "enabled", "architectures", "arch"})
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """Where packages of some suites are."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    """Further fields, such as ``Signed-By``, as apt has them."""

    def stanza(self) -> str:
        """As deb822 text."""
        fields = {
            "Types": "deb",
            "URIs": " ".join(self.uris),
            "Suites": " ".join(self.suites),
            "Components": " ".join(self.components),
        }
        return "".join(f"{name}: {value}\n" for name, value in [*fields.items(), *self.options])


def check_suite(suite: str) -> str:
    """The suite, if it can be one.

    Raises:
        InvalidInputError: it cannot.
    """
    if not _SUITE.fullmatch(suite):
        raise InvalidInputError(f"'{suite[:60]}' is not a Debian suite - name one such as bookworm")
    return suite


def sources_text(suite: str, mirror: str | None = None, apt: Path = APT, release: Path | None = None) -> str:
    """What apt needs to know to fetch packages of a suite, in deb822 form.

    Args:
        mirror: a mirror's address, in place of the machine's own.
        apt: the folder of the machine's apt configuration.
        release: the machine's os-release file.
    Returns:
        Empty when the machine has no Debian mirror, so that its tools fall back on what they know themselves.
    Raises:
        InvalidInputError: the suite or the mirror is impossible.
    """
    check_suite(suite)
    if mirror is not None:
        return Source((_checked(mirror),), _suites(suite), ("main",)).stanza()
    known = [source for source in read_sources(apt) if "main" in source.components]
    wanted = _of(known, suite)
    if not wanted:
        own = _own_suite(release or Path("/etc/os-release"))
        wanted = [_turned(source, own, suite) for source in _of(known, own)] if own else []
    return "\n".join(source.stanza() for source in wanted if source.suites)


def read_sources(apt: Path = APT) -> list[Source]:
    """Every enabled source of packages; what cannot be read is left out, as apt would complain about it."""
    found: list[Source] = []
    folder = apt / "sources.list.d"
    for path in (apt / "sources.list", *sorted(folder.glob("*.list"))):
        found += _one_line(_text(path).splitlines())
    for path in sorted(folder.glob("*.sources")):
        found += _deb822(_text(path))
    return found


def _one_line(lines: Iterable[str]) -> list[Source]:
    found = []
    for line in lines:
        match = _LINE.fullmatch(line.partition("#")[0].strip())
        if match is not None:
            pairs = [option.partition("=")[::2] for option in (match["options"] or "").split()]
            options = {name.rstrip("+-").title(): value.replace(",", " ") for name, value in pairs}
            found.append(
                Source((match["uri"],), (match["suite"],), tuple(match["components"].split()), _kept(options))
            )
    return found


def _deb822(text: str) -> list[Source]:
    found = []
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        low = {key.lower(): value for key, value in fields.items()}
        if "deb" in low.get("types", "").split() and low.get("enabled", "yes").lower() not in ("no", "false"):
            found.append(
                Source(
                    tuple(low.get("uris", "").split()),
                    tuple(low.get("suites", "").split()),
                    tuple(low.get("components", "").split()),
                    _kept(fields),
                )
            )
    return found


def _kept(fields: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in fields.items() if name and name.lower() not in _DROPPED)


def _of(sources: Iterable[Source], suite: str) -> list[Source]:
    """Each source with those of its suites that belong to a release, without the empty ones."""
    names = {*(f"{suite}{part}" for part in _PARTS), f"{suite}/updates"}
    reduced = [
        replace(source, suites=tuple(name for name in source.suites if name in names), components=("main",))
        for source in sources
    ]
    return [source for source in reduced if source.suites]


def _turned(source: Source, own: str, suite: str) -> Source:
    """The same mirror for another release."""
    turned = (f"{suite}{name.removeprefix(own)}".replace("/updates", "-security") for name in source.suites)
    return replace(source, suites=tuple(n for n in turned if n == suite or suite not in _WITHOUT_PARTS))


def _suites(suite: str) -> tuple[str, ...]:
    return (suite,) if suite in _WITHOUT_PARTS else (suite, f"{suite}-updates")


def _own_suite(release: Path) -> str | None:
    fields = dict(line.partition("=")[::2] for line in _text(release).splitlines())
    name = fields.get("VERSION_CODENAME", "").strip('"')
    return name if fields.get("ID", "").strip('"') == "debian" and _SUITE.fullmatch(name) else None


def _checked(mirror: str) -> str:
    parts = urlsplit(mirror)
    if parts.scheme not in ("http", "https", "file") or re.search(r"\s", mirror) or not parts.path:
        raise InvalidInputError(
            f"'{mirror[:80].rpartition('@')[2]}' is not a mirror - write it like https://HOST/debian"
        )
    return mirror


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
