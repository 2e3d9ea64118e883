"""conda's way to write a dependency, translated to PEP 508.

conda's ``=`` is fuzzy (``numpy=1.26`` is any 1.26.x), a space is a separator, and a third field is a build.

Source:
    conda's MatchSpec, https://docs.conda.io/projects/conda/en/stable/user-guide/concepts/pkg-specs.html
"""

import re
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from flops.core.errors import InvalidInputError
from flops.repo.conda_names import PYPI_NAMES, is_native

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_BRACKETS = re.compile(r"^(?P<name>[^\[]*)\[(?P<fields>.*)\]$")
_FIELD = re.compile(r"""(\w+)\s*=\s*(?:'([^']*)'|"([^"]*)"|([^,\s]+))""")
_OPERATOR = re.compile(r"(===|==|>=|<=|!=|~=|=|>|<)?\s*(\S+)")


@dataclass(frozen=True)
class Translated:
    """One conda dependency in our words; ``requirement`` is None where pip has nothing to install."""

    name: str
    """conda's name, in lower case."""
    requirement: str | None
    python: str | None = None
    """Specifiers, if the dependency was Python itself ("" for any version)."""
    warning: str | None = None


def translate(line: str, where: str = "conda.yaml") -> Translated:
    """Translate one entry of ``dependencies``.

    Args:
        where: the file, for the message.
    Raises:
        InvalidInputError: it cannot be read.
    """
    name, version = _parts(line, where)
    if name == "python":
        wish, lost = specifiers(version, line, where)
        # "python==3.10" is written for any 3.10; the exact version 3.10 (3.10.0) nobody has
        wish = re.sub(r"^==(\d+(\.\d+)?)$", r"==\1.*", wish)
        return Translated(name, None, wish, lost)
    if is_native(name):
        return Translated(name, None)
    pypi = PYPI_NAMES.get(name, name)
    wanted, lost = specifiers(version, line, where)
    try:
        requirement = str(Requirement(f"{pypi}{wanted}"))
    except InvalidRequirement as error:
        raise unusable(line, where, "its name is none that PyPI could have") from error
    return Translated(name, requirement, warning=lost)


def specifiers(version: str, line: str, where: str) -> tuple[str, str | None]:
    """PEP 440 specifiers for a version field of conda, and a warning about what got lost.

    Raises:
        InvalidInputError: it is no version.
    """
    if version in ("", "*"):
        return "", None
    if "|" in version:
        return "", f"{where}: the alternatives in '{line}' have no counterpart in pip, any version is taken"
    parts = [_specifier(part.strip(), line, where) for part in version.split(",") if part.strip(" *")]
    try:
        return str(SpecifierSet(",".join(parts))), None
    except InvalidSpecifier as error:
        raise unusable(line, where, f"'{version}' is no version") from error


def unusable(line: str, where: str, why: str) -> InvalidInputError:
    """The error for a line that nothing can be made of."""
    return InvalidInputError(
        f"{where}: the dependency '{line[:120]}' cannot be used: {why} - write it like 'numpy=1.26.4'"
    )


def _parts(line: str, where: str) -> tuple[str, str]:
    """Name and version field (with operators, without build string)."""
    text = line.strip()
    fields: dict[str, str] = {}
    bracket = _BRACKETS.match(text)
    if bracket is not None:
        text = bracket["name"]
        fields = {key: a or b or c for key, a, b, c in _FIELD.findall(bracket["fields"])}
    # "conda-forge::numpy", "conda-forge/linux-64::numpy"; the index that pip uses is this machine's
    text = text.rpartition("::")[2].strip()
    match = _NAME.match(text)
    if match is None:
        raise unusable(line, where, "it starts with no name")
    name = match[0].lower()
    rest = text[match.end() :].strip()
    if rest and not (rest[0] in "=<>!~*" or text[match.end()].isspace()):
        raise unusable(line, where, f"'{rest[0]}' follows the name")
    if "version" in fields:
        rest = fields["version"].strip()
    return name, _without_build(rest, line, where)


def _without_build(rest: str, line: str, where: str) -> str:
    """The version field of ``1.2 py39_0``, ``=1.2=py39_0``, ``>=1.2,<2 py39_0``."""
    rest = re.sub(r"\s*([,|])\s*", r"\1", rest)
    rest = re.sub(r"(===|==|>=|<=|!=|~=|=|>|<)\s+", r"\1", rest)
    version, _, build = rest.partition(" ")
    if re.search(r"[<>~!]", build):
        raise unusable(line, where, "a comma is missing between its versions")
    single = re.match(r"^(==?|)([^=<>!~,|]+)=[^=]", version)
    return single[1] + single[2] if single is not None else version


def _specifier(part: str, line: str, where: str) -> str:
    match = _OPERATOR.fullmatch(part)
    if match is None:
        raise unusable(line, where, f"'{part}' is no version")
    operator, text = match[1] or "==", match[2]
    bare = re.sub(r"(\.?\*)+$", "", text)
    starred = bare != text
    try:
        version = Version(bare)
    except InvalidVersion as error:
        raise unusable(line, where, f"'{text}' is no version") from error
    plain = not (version.is_prerelease or version.is_postrelease or version.local)
    if operator == "=":  # fuzzy: this version and everything below it
        return f"=={version.public}.*" if plain else f"=={version}"
    if operator in ("==", "!=") and starred:
        return f"{operator}{version.public}.*" if plain else f"{operator}{version}"
    if operator == "===":
        return f"=={version}"
    if operator == "~=" and len(version.release) < 2:
        return f">={version.public},<{version.release[0] + 1}"
    if operator in (">=", "<=", ">", "<", "~="):
        return f"{operator}{version.public}"
    return f"{operator}{version}"
