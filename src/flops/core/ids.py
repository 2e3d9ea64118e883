"""Identifiers: what the things of FLOps are called, and which names are allowed."""

import re
import secrets
from typing import NewType

from flops.core.errors import InvalidInputError

ProjectId = NewType("ProjectId", str)
LearnerId = NewType("LearnerId", str)
ServiceName = NewType("ServiceName", str)

# No vowels and no look-alikes: ids are read aloud, typed, and must not spell words.
_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"
_PROJECT_ID = re.compile(r"p-[0-9a-z]{4,12}")
_SERVICE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?")


def new_project_id() -> ProjectId:
    """A fresh id such as ``p-7k2mqd``: short enough to type, one of 387 million."""
    return ProjectId("p-" + "".join(secrets.choice(_ALPHABET) for _ in range(6)))


def project_id(text: str) -> ProjectId:
    """Check a project id that came from outside.

    Raises:
        InvalidInputError: the text is no project id (it may be used in paths).
    """
    if not _PROJECT_ID.fullmatch(text):
        raise InvalidInputError(f"'{text[:40]}' is not a project id - ids look like p-7k2mqd, see 'flops ls'")
    return ProjectId(text)


def service_name(project: ProjectId, role: str, number: int | None = None) -> ServiceName:
    """The unique short name of one deployed component, at most 60 characters on any platform.

    Raises:
        InvalidInputError: the role does not fit in a service name.
    """
    name = f"{project}-{role}" if number is None else f"{project}-{role}-{number}"
    if not _SERVICE_NAME.fullmatch(name):
        raise InvalidInputError(f"'{name}' cannot name a service - use at most 60 of a-z, 0-9 and '-'")
    return ServiceName(name)
