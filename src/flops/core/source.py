"""Where a repository is: what a user may name, how ``@REF`` is split off, and what may be shown of it.

Nothing here touches a disk or a network; every answer follows from the text alone.
"""

import re
from urllib.parse import urlsplit, urlunsplit

from flops.core.errors import InvalidInputError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/]*)(?P<path>/.*)?")
# git's own rule: a colon before the first slash makes it an address, not a folder
_SCP = re.compile(r"(?P<host>[^/:]+):(?P<path>.+)", re.DOTALL)
_SCHEMES = frozenset({"https", "http", "ssh", "git", "file", "git+ssh", "ssh+git"})
_NOT_IN_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")
_LONGEST = 4096


def is_folder(repo: str) -> bool:
    """Whether the text names a folder of this machine rather than a remote repository."""
    return not (_URL.match(repo) or _SCP.fullmatch(repo))


def split_ref(text: str) -> tuple[str, str | None]:
    """Split ``REPO@REF``; the second is None where no reference is named.

    The ``@`` of ``git@host:path``, ``https://user@host/`` and ``https://host/@scope/name`` is no separator.
    In a folder's path only its last part may carry a reference: ``/data/x@v1/`` (with the slash) is
    the folder ``x@v1``.
    """
    if match := _URL.fullmatch(text) or _SCP.fullmatch(text):
        start = match.start("path") if match["path"] else len(text)
    else:
        start = text.rfind("/") + 1
    at = text.rfind("@", start)
    if at <= start or at == len(text) - 1 or text[at - 1] == "/":
        return text, None
    return text[:at], text[at + 1 :]


def check_repo(repo: str) -> str:
    """Return the repository's address unchanged if git may be given it.

    Raises:
        InvalidInputError: it is empty, too long, an option or a remote helper (`ext::` runs commands).
    """
    if not repo.strip() or len(repo) > _LONGEST or re.search(r"[\x00-\x1f\x7f]", repo):
        raise InvalidInputError(f"must be a git URL or a folder, one line of 1 to {_LONGEST} characters")
    if repo.startswith("-") or re.match(r"[A-Za-z0-9+.-]*::", repo):
        raise InvalidInputError("is an option or a remote helper of git - name a URL or a folder")
    if match := _URL.match(repo):
        if match["scheme"].lower() not in _SCHEMES:
            raise InvalidInputError(
                f"has the scheme '{match['scheme']}' - use https, ssh, git or file, or name a folder"
            )
        if match["authority"].rpartition("@")[2].startswith("-"):
            raise InvalidInputError("has a host that starts with '-' - check the URL")
    elif (match := _SCP.fullmatch(repo)) and match["host"].rpartition("@")[2].startswith("-"):
        raise InvalidInputError("has a host that starts with '-' - check the address")
    return repo


def check_ref(ref: str) -> str:
    """Return the branch, tag or commit unchanged if it can be one.

    Raises:
        InvalidInputError: git allows no such name, or it would be read as an option.
    """
    if not ref or len(ref) > 255 or ref.startswith(("-", "/")) or ref.endswith(("/", ".", ".lock")):
        raise InvalidInputError("is not the name of a branch, a tag or a commit")
    if _NOT_IN_REF.search(ref):
        raise InvalidInputError(
            "is not the name of a branch, a tag or a commit - spaces and any of ~^:?*[\\ are not allowed"
        )
    return ref


def redact(repo: str) -> str:
    """The repository's address without credentials: fit for events, logs and tracking.

    A login name of ssh (`git@`) stays; anything else before the host and every query is hidden.
    """
    if not _URL.match(repo):
        return repo
    try:
        parts = urlsplit(repo)
    except ValueError:
        return "***"
    userinfo, at, host = parts.netloc.rpartition("@")
    if at and (":" in userinfo or "ssh" not in parts.scheme):
        userinfo = "***"
    query = "***" if parts.query else ""
    return urlunsplit((parts.scheme, userinfo + at + host, parts.path, query, ""))
