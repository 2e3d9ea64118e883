"""Lines as pip takes them (``requirements.txt`` and the pip part of ``conda.yaml``), read strictly.

Taken: PEP 508 requirements, ``-r`` inside the checkout, wheels and git repositories by https or ssh. Options
that choose an index are not: where packages come from is decided on the machine that runs them, never by a
repository.
"""

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from flops.core.errors import InvalidInputError

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 10
_SCHEMES = frozenset({"https", "git+https", "git+ssh"})
_COMMENT = re.compile(r"(^|\s)#.*$")
_LINE_OPTION = re.compile(r"\s--(?:hash|config-settings?|global-option|install-option)[=\s].*$")
_EGG = re.compile(r"[#&]egg=([A-Za-z0-9._-]+)")
_WITH_INDEX = re.compile(
    r"(-i|-f|--index-url|--extra-index-url|--find-links|--no-index|--trusted-host)\b|-[if]\S"
)


@dataclass
class Lines:
    """What was read so far."""

    requirements: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_file(checkout: Path, name: str, into: Lines, depth: int = 0) -> None:
    """Read a requirements file of the checkout, and those it includes.

    Raises:
        InvalidInputError: a line cannot be used, or a file is missing, too large, or outside the checkout.
    """
    path = (checkout / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(checkout.resolve()) or "://" in name:
        raise InvalidInputError(
            f"the requirements file '{name[:80]}' lies outside the repository - move it in"
        )
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"the requirements file '{name}' includes itself - remove the circle")
    relative = path.relative_to(checkout.resolve())
    text = read_text(path, str(relative))
    read_lines(_joined(text), str(relative), checkout, into, relative.parent, depth)


def read_lines(
    lines: Iterable[str],
    where: str,
    checkout: Path,
    into: Lines,
    folder: Path | None = None,
    depth: int = 0,
) -> None:
    """Read lines of pip found in ``where``; ``-r`` is relative to ``folder`` (of the checkout)."""
    for raw in lines:
        line = _COMMENT.sub("", raw).strip()
        if not line:
            continue
        included = re.match(r"(?:-r|--requirement)[=\s]*(\S+)$", line)
        if included is not None:
            read_file(checkout, str((folder or Path()) / included[1]), into, depth + 1)
        elif re.match(r"(-e|--editable)\b", line):
            raise unusable(line, where, "it is a folder to install from")
        elif line.startswith("-"):
            into.warnings.append(_about_option(line, where))
        else:
            into.requirements.append(requirement(line, where))


def requirement(line: str, where: str) -> str:
    """One line as a PEP 508 requirement.

    Raises:
        InvalidInputError: it is none, or comes from a place that is not allowed.
    """
    line = _LINE_OPTION.sub("", line).strip()
    if not line.isprintable():
        raise unusable(line, where, "it holds characters that cannot be seen")
    if "${" in line:
        # uv would put our environment's value in, secrets included, and send it to the address
        raise unusable(line, where, "it asks for an environment variable")
    try:
        parsed = Requirement(_named(line))
    except InvalidRequirement as error:
        why = "it is a path" if re.match(r"[./~]", line) else str(error).splitlines()[0].rstrip(".")
        raise unusable(line, where, why) from error
    if parsed.url is not None and urlsplit(parsed.url).scheme not in _SCHEMES:
        raise unusable(line, where, "its address is none of https, git+https, git+ssh")
    return str(parsed)


def read_text(path: Path, name: str) -> str:
    """A text file of a repository.

    Raises:
        InvalidInputError: it is missing, too large, or no UTF-8 text.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError(f"{name} is larger than {MAX_FILE_BYTES >> 10} KiB - shorten it")
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidInputError(
            f"the repository has no file {name} - add it, or remove what names it"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name} is no UTF-8 text - save it as such") from error


def unusable(line: str, where: str, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"{where}: the dependency {shown(line)} cannot be used: {why} - write it like 'numpy==1.26.4'"
    )


def shown(entry: object) -> str:
    """Something read from a file, quoted for a message: on one line, and short whatever it holds."""
    text = entry if isinstance(entry, str) else reprlib.repr(entry)
    return f"'{''.join(char if char.isprintable() else ' ' for char in text[:120])}'"


def _named(line: str) -> str:
    """Give a bare address the name that PEP 508 wants: from its ``egg=``, or from the wheel's file name."""
    if "://" not in line or re.match(r"[A-Za-z0-9._-]+\s*(\[[^\]]*\])?\s*@", line):
        return line
    egg = _EGG.search(line)
    if egg is not None:
        return f"{egg[1]} @ {line[: egg.start()]}"
    try:
        name, *_ = parse_wheel_filename(urlsplit(line).path.rpartition("/")[2])
    except InvalidWheelFilename:
        return line
    return f"{name} @ {line}"


def _about_option(line: str, where: str) -> str:
    option = re.split(r"[=\s]", line, maxsplit=1)[0]
    if _WITH_INDEX.match(line):
        return (
            f"{where}: '{option}' is ignored; "
            "package indexes are those of the pip configuration of the machine"
        )
    return f"{where}: the option '{option}' is ignored"


def _joined(text: str) -> Iterator[str]:
    """Logical lines: a backslash at the end continues a line."""
    yield from re.sub(r"\\\r?\n", " ", text).splitlines()
