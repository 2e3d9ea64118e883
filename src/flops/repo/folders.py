"""Folders of this machine: what of them belongs to the repository, copied and named by content."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.repo.git import Git, Limits, explained, too_large

_NEVER = frozenset({".git", ".hg", ".svn", ".venv", "__pycache__", ".mypy_cache", ".pytest_cache"})
_BLOCK = 1 << 20


def is_bare(git: Git, folder: Path) -> bool:
    """Whether the folder itself is a bare git repository (and not merely inside one)."""
    if not (folder / "HEAD").is_file() or not (folder / "objects").is_dir():
        return False
    return git.run("rev-parse", "--is-bare-repository", folder=folder).text == "true"


def work_tree(git: Git, folder: Path) -> Path | None:
    """The top of the git work tree that the folder lies in, or None.

    Raises:
        UnauthorizedError: it belongs to another user.
    """
    result = git.run("rev-parse", "--show-toplevel", folder=folder)
    if result.returncode:
        if "dubious ownership" in result.stderr:
            raise explained(result, str(folder), None, Limits())
        return None
    top = Path(os.fsdecode(result.stdout.removesuffix(b"\n"))).resolve()
    return top if folder.is_relative_to(top) else None


def copy(
    git: Git, folder: Path, top: Path | None, content: Path, limits: Limits, source: str
) -> tuple[str, tuple[str, ...]]:
    """Copy a folder as it is on disk to ``content``; gives its commit and warnings.

    With git: tracked files, and new ones that are neither ignored nor the usual clutter. Without: all but
    clutter.
    """
    inside = top is not None and not _is_ignored(git, folder, top)
    files = _listed(git, folder) if inside else list(_walked(folder))
    _copy_files(folder, files, content, limits, source)
    head = git.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}", folder=folder) if inside else None
    if head is None or head.returncode:
        return f"tree-{tree_hash(content)[:16]}", ()
    status = git.must(
        *("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", "."), folder=folder
    )
    entries = [os.fsdecode(entry) for entry in status.stdout.split(b"\0") if entry]
    changed = len([entry for entry in entries if not (entry.startswith("??") and _is_clutter(entry[3:]))])
    if not changed:
        return head.text, ()
    warning = f"'{source}' has uncommitted changes ({changed} files); they are part of this project"
    return f"{head.text}+dirty-{tree_hash(content)[:12]}", (warning,)


def tree_hash(folder: Path) -> str:
    """SHA-256 over names, kinds and contents of everything in a folder; independent of times and owners."""
    digest = hashlib.sha256()
    for path in sorted(_everything(folder), key=lambda found: os.fsencode(found.relative_to(folder))):
        name = os.fsencode(path.relative_to(folder))
        if path.is_symlink():
            kind, body = b"link", hashlib.sha256(os.fsencode(path.readlink())).digest()
        else:
            kind = b"program" if path.stat().st_mode & 0o100 else b"file"
            with path.open("rb") as file:
                body = hashlib.file_digest(file, "sha256").digest()
        digest.update(len(name).to_bytes(4, "big") + name + kind + b"\0" + body)
    return digest.hexdigest()


def refuse_outward_links(content: Path, source: str) -> None:
    """Symbolic links must stay inside the checkout: another place would be read with our rights.

    Raises:
        InvalidInputError: names the first link that does not.
    """
    root = content.resolve()
    for path in _everything(content):
        if not path.is_symlink():
            continue
        target = path.readlink()
        try:
            inside = not target.is_absolute() and (path.parent / target).resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # a loop
            inside = False
        if not inside:
            raise InvalidInputError(
                f"'{source}' has a symbolic link that leaves it: {path.relative_to(content)} -> {target} - "
                "put the file itself into the repository"
            )


def _is_ignored(git: Git, folder: Path, top: Path) -> bool:
    """A folder that its work tree ignores (a scratch folder) is a folder without git."""
    return folder != top and git.run("check-ignore", "--quiet", "--", str(folder), folder=top).returncode == 0


def _listed(git: Git, folder: Path) -> list[Path]:
    listing = ("ls-files", "-z", "--deduplicate")
    tracked = git.must(*listing, "--cached", folder=folder).stdout.split(b"\0")
    new = git.must(*listing, "--others", "--exclude-standard", folder=folder).stdout.split(b"\0")
    kept = [*map(os.fsdecode, tracked), *(name for name in map(os.fsdecode, new) if not _is_clutter(name))]
    names = [Path(name) for name in kept if name]
    # deleted on disk: gone; a folder: a submodule or another repository inside
    return [name for name in names if (folder / name).is_symlink() or (folder / name).is_file()]


def _is_clutter(name: str) -> bool:
    """What running or checking code leaves behind, even where no .gitignore says so."""
    return not _NEVER.isdisjoint(Path(name).parts)


def _walked(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in _NEVER]
        for name in [*files, *(name for name in names if (Path(parent) / name).is_symlink())]:
            path = Path(parent) / name
            if path.is_symlink() or path.is_file():
                yield path.relative_to(folder)


def _copy_files(folder: Path, files: list[Path], content: Path, limits: Limits, source: str) -> None:
    content.mkdir()
    size = 0
    if len(files) > limits.max_files:
        raise too_large(source, limits)
    for name in files:
        origin, target = folder / name, content / name
        size += origin.lstat().st_size
        if size > limits.max_bytes:
            raise too_large(source, limits)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copy2(origin, target, follow_symlinks=False)
        except OSError as error:
            raise InvalidInputError(
                f"'{source}' cannot be read: {name}: {error.strerror} - mend its permissions"
            ) from error


def _everything(folder: Path) -> Iterator[Path]:
    """All files and links, not following links to folders."""
    for parent, names, files in os.walk(folder):
        for name in [*files, *names]:
            path = Path(parent) / name
            if path.is_symlink() or not path.is_dir():
                yield path
