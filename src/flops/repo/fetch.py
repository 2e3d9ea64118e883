"""Fetching: a URL or a folder becomes a plain folder with the content of one commit."""

import difflib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flops.core.errors import InvalidInputError, NotFoundError
from flops.repo import folders
from flops.repo.git import Git, Limits, no_such_ref, redacted, too_large

Progress = Callable[[str], None]

_SCP_LIKE = re.compile(r"[\w.-]+@[\w.-]+:[^/\s]\S*|[\w.-]+@[\w.-]+:/\S*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?:/|:)")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,63}")
_NO_REF = re.compile(r"[\s\x00-\x1f\x7f~^:?*\[\\]|\.\.|@\{|^[-+/.]|[/.]$|//|\.lock$")
_SHOWN_REFS = 5


@dataclass(frozen=True)
class Checkout:
    """Content of a repository at one commit, in a folder of its own."""

    path: Path
    commit: str
    """Full commit id; ``<id>+dirty-<hash>`` for a folder with changes; ``tree-<hash>`` without git."""
    source: str
    """Where it came from, without a password."""
    ref: str | None
    warnings: tuple[str, ...] = ()


def fetch(
    source: str,
    ref: str | None,
    destination: Path,
    progress: Progress | None = None,
    *,
    limits: Limits | None = None,
    cancel: threading.Event | None = None,
) -> Checkout:
    """Bring a repository to ``destination``; what was there before is replaced at the end, in one step.

    A URL is cloned shallowly at ``ref``. A folder is taken as it is on disk (less what git ignores), or,
    with a ``ref``, as it is in that commit of its git repository; it may lie deeper in a work tree.

    Args:
        source: https, ssh or file URL, ``user@host:path``, or a folder.
        ref: branch, tag or commit (at least 7 hex digits); a tag wins over a branch of that name. None: the
            repository's default.
        progress: told short messages; what it raises ends the call.
        cancel: set it from another thread to end the call.
    Raises:
        InvalidInputError: source or ref are not usable, the content is too large or has links that leave it.
        NotFoundError: no such repository, folder, branch, tag or commit.
        UnauthorizedError: the repository asks for a login, or belongs to another user.
        UnavailableError: the host cannot be reached, or is too slow.
        FailedError: git is missing or failed otherwise, or ``cancel`` was set.
    """
    limits = limits or Limits()
    if ref is not None and (not ref or len(ref) > 255 or _NO_REF.search(ref)):
        raise InvalidInputError(
            f"'{ref[:80]}' is no branch, tag or commit - write it like main, v1.2 or 1a2b3c4"
        )
    folder = local_folder(source)
    git = Git(source, limits, cancel)
    work = destination.absolute().with_name(f".{destination.name}.fetching")
    _remove(work)
    work.mkdir(parents=True)
    warnings: tuple[str, ...] = ()
    try:
        # No link in the repository can foresee this name: one that leaves the folder never comes back in.
        content = work / f"content-{secrets.token_hex(8)}"
        if folder is None:
            commit = _clone(git, source, ref, content, limits, progress)
        else:
            commit, warnings = _take_folder(git, source, folder, ref, content, limits, progress)
        folders.refuse_outward_links(content, redacted(source))
        notes = (*warnings, *_notes(content))
        _put(content, destination.absolute(), work)
    finally:
        _remove(work)
    return Checkout(destination, commit, redacted(source), ref, notes)


def local_folder(source: str) -> Path | None:
    """The folder that a source names, or None if it is a URL that git must fetch.

    Raises:
        InvalidInputError, NotFoundError
    """
    if not source or source.startswith("-") or any(ord(char) < 32 for char in source):
        raise InvalidInputError(
            f"'{source[:80]}' is no repository - give an https, ssh or file URL, or a folder"
        )
    scheme = _SCHEME.match(source)
    if scheme is not None and scheme[1].lower() == "file":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise InvalidInputError(f"'{source}' names a host - write file URLs as file:///FOLDER")
        return _existing(Path(unquote(parts.path)), source)
    if scheme is not None and scheme[1].lower() in ("https", "ssh") and "://" in source:
        if not urlsplit(source).hostname:
            raise InvalidInputError(f"'{redacted(source)}' names no host - write it like https://HOST/REPO")
        return None
    if scheme is not None and scheme[1].lower() == "http":
        raise InvalidInputError(f"'{redacted(source)}' is not encrypted - use https://")
    if scheme is not None and not Path(source).exists():
        raise InvalidInputError(
            f"'{redacted(source)}' uses a protocol that is not allowed - "
            "use an https, ssh or file URL, or a folder"
        )
    if _SCP_LIKE.fullmatch(source) and not Path(source).exists():
        return None
    return _existing(Path(source).expanduser(), source)


def _existing(folder: Path, source: str) -> Path:
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise InvalidInputError(f"'{source}' is a file - give the folder of a repository, or a URL")
    raise NotFoundError(
        f"there is no folder '{source}' - give an existing folder, or a URL such as https://HOST/REPO"
    )


def _take_folder(
    git: Git,
    source: str,
    folder: Path,
    ref: str | None,
    content: Path,
    limits: Limits,
    progress: Progress | None,
) -> tuple[str, tuple[str, ...]]:
    """A folder of this machine: cloned when it is bare or a ref is asked for, else copied as it is."""
    if folders.is_bare(git, folder):
        return _clone(git, folder.as_uri(), ref, content, limits, progress), ()
    top = folders.work_tree(git, folder)
    if ref is None:
        _tell(progress, f"copying {source}")
        return folders.copy(git, folder, top, content, limits, redacted(source))
    if top is None:
        raise NotFoundError(f"'{source}' is no git repository and has no '{ref}' - leave the reference out")
    below = folder.relative_to(top).as_posix()
    return _clone(git, top.as_uri(), ref, content, limits, progress, below), ()


def _clone(
    git: Git,
    url: str,
    ref: str | None,
    content: Path,
    limits: Limits,
    progress: Progress | None,
    below: str = ".",
) -> str:
    """Lay down one commit of a repository (or its folder ``below``) as ``content``; gives the commit."""
    _tell(progress, f"fetching {redacted(url)}")
    store = content.with_name("git")
    git.must("init", "--quiet", "--template=", str(store))
    commit = _fetch_commit(git, store, url, ref)
    _check_size(git, store, commit, below, url, limits)
    tree = content.with_name("tree")
    tree.mkdir()
    places = ("--git-dir", str(store / ".git"), "--work-tree", str(tree))
    git.must(*places, "checkout", "--quiet", "--force", commit, "--", below, folder=tree)
    (tree / below).rename(content)
    _tell(progress, f"fetched commit {commit[:12]}")
    return commit


def _fetch_commit(git: Git, store: Path, url: str, ref: str | None) -> str:
    """Bring the wanted commit alone into ``store``; gives its full id."""
    shallow = ("fetch", "--quiet", "--no-tags", "--depth", "1", "--", url)
    result = git.run(*shallow, ref or "HEAD", folder=store)
    if result.returncode and ref is not None:
        commit = _find_commit(git, store, url, ref)
        if commit is None:
            names = _nearest_refs(git, store, url, ref)
            raise no_such_ref(redacted(url), ref, names)
        return commit
    if result.returncode:
        git.must(*shallow, "HEAD", folder=store)
    return git.must("rev-parse", "--verify", "--quiet", "FETCH_HEAD^{commit}", folder=store).text


def _find_commit(git: Git, store: Path, url: str, ref: str) -> str | None:
    """A commit that the server does not give out by name: look for it in all branches and tags.

    Raises the reason when the repository cannot be read at all.
    """
    if not (_COMMIT.fullmatch(ref) or _SHORT_COMMIT.fullmatch(ref)):
        git.must("ls-remote", "--quiet", "--heads", "--", url, folder=store)
        return None
    everything = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
    git.must("fetch", "--quiet", "--", url, *everything, folder=store)
    found = git.run("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}", folder=store)
    return found.text if found.returncode == 0 else None


def _nearest_refs(git: Git, store: Path, url: str, ref: str) -> list[str]:
    listed = git.run("ls-remote", "--quiet", "--heads", "--tags", "--refs", "--", url, folder=store)
    names = [
        line.partition("\t")[2].removeprefix("refs/heads/").removeprefix("refs/tags/")
        for line in listed.text.splitlines()
    ]
    near = difflib.get_close_matches(ref, names, n=_SHOWN_REFS, cutoff=0.5)
    rest = [name for name in names if name not in near]
    return [*near, *rest][:_SHOWN_REFS]


def _check_size(git: Git, store: Path, commit: str, below: str, url: str, limits: Limits) -> None:
    """Refuse before anything is unpacked: compressed content may be small."""
    spec = commit if below == "." else f"{commit}:{below}"
    listed = git.run("ls-tree", "-r", "-l", "-z", "--full-tree", spec, folder=store)
    if listed.returncode:
        raise NotFoundError(
            f"'{redacted(url)}' has no folder '{below}' in commit {commit[:12]} - name another"
        )
    entries = [entry.split(b"\t", 1)[0].split() for entry in listed.stdout.split(b"\0") if entry]
    total = sum(int(entry[3]) for entry in entries if entry[1] == b"blob")
    if total > limits.max_bytes or len(entries) > limits.max_files:
        raise too_large(redacted(url), limits)


def _notes(content: Path) -> list[str]:
    """What was left out of a checkout and may be missed."""
    notes = []
    if (content / ".gitmodules").exists():
        notes.append("git submodules are not fetched")
    attributes = content / ".gitattributes"
    if attributes.is_file() and b"filter=lfs" in attributes.read_bytes()[: 1 << 20]:
        notes.append("files in Git LFS are not fetched")
    return notes


def _put(content: Path, destination: Path, work: Path) -> None:
    if destination.is_symlink() or destination.exists():
        destination.rename(work / "replaced")
    content.rename(destination)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder, onerror=_make_writable)


def _make_writable(function: Callable[[str], object], path: str, _error: object) -> None:
    """Objects of git are read-only, and so may be what a user's folder held."""
    os.chmod(os.path.dirname(path), 0o700)  # noqa: PTH101, PTH120 - shutil hands strings
    if not os.path.islink(path):  # noqa: PTH114
        os.chmod(path, 0o700)  # noqa: PTH101
    function(path)


def _tell(progress: Progress | None, message: str) -> None:
    if progress is not None:
        progress(message)
