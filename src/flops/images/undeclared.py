"""Bounds that packages need and do not declare, so that no resolver can know them.

Each entry breaks at import on a resolution that the packages' own metadata allow. Old pins are normal in
FLOps repositories (``numpy=1.26.4`` beside whatever is new), so the resolver meets these daily. An entry
leaves when all its versions are gone from use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


@dataclass(frozen=True)
class Bound:
    """Where ``package`` is in ``versions``, ``other`` must be in ``needed``; ``constraint`` mends it."""

    package: str
    versions: str
    other: str
    needed: str
    constraint: str


BOUNDS = (
    # "ImportError: pyarrow requires NumPy 2.0 or newer, found 1.26.4"; its metadata name no numpy at all.
    Bound("pyarrow", ">=26", "numpy", ">=2", "pyarrow<26"),
    # Compiled against numpy 1: "A module that was compiled using NumPy 1.x cannot be run in NumPy 2".
    Bound("torch", "<2.3", "numpy", "<2", "numpy<2"),
)


def broken_bounds(pins: Sequence[str]) -> list[Bound]:
    """The bounds that a set of pins (``name==version``) breaks."""
    versions = _pinned(pins)
    return [
        bound
        for bound in BOUNDS
        if _contains(bound.versions, versions.get(bound.package))
        and bound.other in versions
        and not _contains(bound.needed, versions[bound.other])
    ]


def foreseen(requirements: Sequence[str]) -> list[str]:
    """Constraints that the pins among some requirements make likely to be needed: one resolution less."""
    versions = _pinned(requirements)
    return [
        bound.constraint
        for bound in BOUNDS
        if _contains(bound.versions, versions.get(bound.package))
        or (bound.other in versions and not _contains(bound.needed, versions[bound.other]))
    ]


def _pinned(requirements: Sequence[str]) -> dict[str, str]:
    """Versions of what is pinned, by name."""
    versions: dict[str, str] = {}
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        for specifier in requirement.specifier:
            if specifier.operator in ("==", "==="):
                versions[canonicalize_name(requirement.name)] = specifier.version.removesuffix(".*")
    return versions


def _contains(specifiers: str, version: str | None) -> bool:
    return version is not None and SpecifierSet(specifiers).contains(version, prereleases=True)
