"""Consent: what the owner of data on a joined node allows to run on them.

Decided on the node, before anything is fetched; the manager asks the same questions, to say early why a
project will not run there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flops.core.errors import InvalidInputError

MAX_ENTRIES = 1000
MAX_ENTRY_LENGTH = 500


@dataclass(frozen=True)
class Consent:
    """Who may train on which of a node's data; an empty tuple sets no limit of its kind.

    Args:
        tags: projects are given data under these alone, and others are not even said to be there.
        owners, teams: the project belongs to one of these users, or to one of these teams.
        repositories: its code comes from one of them; ``*`` at the end stands for any rest.
    """

    tags: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    teams: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()

    def refusal(self, *, owner: str, team: str | None, repository: str, tags: Iterable[str]) -> str | None:
        """Why a project may not run here, in words that name the rule; None: it may."""
        named = tuple(tags)
        if self.tags and not self.shown(named):
            return f"data tagged {_some(named)} are not allowed on this node (allowed: {_some(self.tags)})"
        if (self.owners or self.teams) and owner not in self.owners and (team or "") not in self.teams:
            whose = f"of '{owner[:80]}'" + (f" (team '{team[:80]}')" if team else "")
            return f"projects {whose} are not allowed on this node (allowed: {self._whom()})"
        if self.repositories and not any(_fits(repository, allowed) for allowed in self.repositories):
            return (
                f"code of '{repository[:200]}' is not allowed on this node (allowed: "
                f"{_some(self.repositories)})"
            )
        return None

    def shown(self, tags: Iterable[str]) -> tuple[str, ...]:
        """Those of a fragment's tags that others may know of, sorted."""
        return tuple(sorted(tag for tag in tags if not self.tags or tag in self.tags))

    def to_json(self) -> dict[str, list[str]]:
        return {
            "tags": [*self.tags],
            "owners": [*self.owners],
            "teams": [*self.teams],
            "repositories": [*self.repositories],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises InvalidInputError: it is no consent, or too large to be one."""
        return cls(**{name: _entries(data.get(name, []), name) for name in cls.__dataclass_fields__})

    def _whom(self) -> str:
        teams = tuple(f"team {team}" for team in self.teams)
        return _some((*self.owners, *teams))


def _fits(repository: str, allowed: str) -> bool:
    if allowed.endswith("*"):
        return repository.startswith(allowed[:-1])
    return _plain(repository) == _plain(allowed)


def _plain(repository: str) -> str:
    return repository.rstrip("/").removesuffix(".git")


def _entries(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_ENTRIES:
        raise InvalidInputError(f"{name} of a consent is no list of at most {MAX_ENTRIES} words")
    for entry in value:
        if not isinstance(entry, str) or not 0 < len(entry) <= MAX_ENTRY_LENGTH:
            raise InvalidInputError(
                f"{name} of a consent holds what is no word of at most {MAX_ENTRY_LENGTH} characters"
            )
    return tuple(dict.fromkeys(value))


def _some(entries: tuple[str, ...]) -> str:
    shown = ", ".join(entry[:80] for entry in entries[:5])
    return shown + (f" and {len(entries) - 5} more" if len(entries) > 5 else "")
