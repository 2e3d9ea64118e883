"""What a checkout holds, and under which commit: from work trees, bare repositories and plain folders."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flops.core.errors import FailedError, FlopsError, InvalidInputError, NotFoundError, UnavailableError
from flops.repo import fetch
from flops.repo.git import Limits

if TYPE_CHECKING:
    from tests.repo.conftest import Repository


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if not path.is_dir()
    }


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if "fetching" in entry.name]


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "project" / "checkout"


# which commit


def test_work_tree_is_taken_at_its_head_without_git(repository: "Repository", destination: Path) -> None:
    got = fetch(str(repository.path), None, destination)
    assert got.commit == repository.git("rev-parse", "HEAD")
    assert contents(destination) == {"model.py": "first\n"}
    assert got.warnings == ()
    assert leftovers(destination.parent) == []


@pytest.mark.parametrize("how", ["branch", "tag", "annotated", "commit", "short commit"])
def test_reference_names_the_commit_that_is_laid_down(
    repository: "Repository", destination: Path, how: str
) -> None:
    old = repository.git("rev-parse", "HEAD")
    repository.git("branch", "old")
    repository.git("tag", "v1")
    repository.git("tag", "--annotate", "--message", "one", "v1-annotated")
    repository.write({"model.py": "second\n"})
    repository.commit()
    ref = {
        "branch": "old",
        "tag": "v1",
        "annotated": "v1-annotated",
        "commit": old,
        "short commit": old[:8],
    }[how]
    got = fetch(repository.path.as_uri(), ref, destination)
    assert (got.commit, got.ref) == (old, ref)
    assert contents(destination) == {"model.py": "first\n"}


def test_tag_wins_over_a_branch_of_the_same_name(repository: "Repository", destination: Path) -> None:
    old = repository.git("rev-parse", "HEAD")
    repository.git("tag", "same")
    repository.write({"model.py": "second\n"})
    repository.commit()
    repository.git("branch", "same")
    assert fetch(repository.path.as_uri(), "same", destination).commit == old


def test_bare_repository_with_an_odd_name_is_cloned(
    repository: "Repository", tmp_path: Path, destination: Path
) -> None:
    bare = tmp_path / "größe 100%.git"
    repository.git("clone", "--quiet", "--bare", ".", str(bare))
    got = fetch(str(bare), None, destination)
    assert got.commit == repository.git("rev-parse", "HEAD")
    assert contents(destination) == {"model.py": "first\n"}


def test_folder_below_the_top_of_a_work_tree_is_taken_alone(
    repository: "Repository", destination: Path
) -> None:
    repository.write({"examples/one/model.py": "below\n"})
    head = repository.commit()
    for ref in (None, "main"):
        got = fetch(str(repository.path / "examples" / "one"), ref, destination)
        assert got.commit == head
        assert contents(destination) == {"model.py": "below\n"}


def test_wrong_reference_names_those_that_there_are(repository: "Repository", destination: Path) -> None:
    repository.git("tag", "v1.0")
    with pytest.raises(NotFoundError) as caught:
        fetch(str(repository.path), "v1.1", destination)
    url = repository.path.as_uri()
    assert str(caught.value) == f"'{url}' has no branch, tag or commit 'v1.1' - it has v1.0, main"
    assert not destination.exists()


def test_reference_of_a_plain_folder_is_refused(tmp_path: Path, destination: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(NotFoundError) as caught:
        fetch(str(plain), "main", destination)
    assert str(caught.value) == (
        f"'{plain}' is no git repository and has no 'main' - leave the reference out"
    )


@pytest.mark.parametrize("ref", ["--upload-pack=x", "a..b", "a b", "", "x~1", "HEAD:model.py", "a@{1}"])
def test_reference_that_git_would_read_otherwise_is_refused(
    repository: "Repository", destination: Path, ref: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        fetch(str(repository.path), ref, destination)
    assert str(caught.value) == (f"'{ref}' is no branch, tag or commit - write it like main, v1.2 or 1a2b3c4")


# work trees that are not clean


def test_uncommitted_changes_are_taken_and_told(repository: "Repository", destination: Path) -> None:
    head = repository.git("rev-parse", "HEAD")
    repository.write({"model.py": "changed\n", "new.py": "new\n"})
    got = fetch(str(repository.path), None, destination)
    assert got.warnings == (
        f"'{repository.path}' has uncommitted changes (2 files); they are part of this project",
    )
    assert contents(destination) == {"model.py": "changed\n", "new.py": "new\n"}
    assert got.commit.startswith(f"{head}+dirty-")
    assert fetch(str(repository.path), None, destination).commit == got.commit
    repository.write({"new.py": "newer\n"})
    assert fetch(str(repository.path), None, destination).commit != got.commit


def test_deleted_file_is_gone_and_ignored_files_stay_behind(
    repository: "Repository", destination: Path
) -> None:
    repository.write({".gitignore": "data/\n", "old.py": "old\n"})
    repository.commit()
    (repository.path / "old.py").unlink()
    repository.write({"data/secret.csv": "1,2\n"})
    fetch(str(repository.path), None, destination)
    assert set(contents(destination)) == {".gitignore", "model.py"}


def test_clutter_of_running_the_code_is_no_change(repository: "Repository", destination: Path) -> None:
    repository.write({"__pycache__/model.cpython-311.pyc": "x", ".venv/lib/big.py": "x"})
    got = fetch(str(repository.path), None, destination)
    assert (got.commit, got.warnings) == (repository.git("rev-parse", "HEAD"), ())
    assert set(contents(destination)) == {"model.py"}


def test_looking_at_a_work_tree_writes_nothing_to_it(repository: "Repository", destination: Path) -> None:
    os.utime(repository.path / "model.py", (1, 1))  # git would refresh its index now
    before = {path: path.stat().st_mtime_ns for path in (repository.path / ".git").rglob("*")}
    fetch(str(repository.path), None, destination)
    assert {path: path.stat().st_mtime_ns for path in (repository.path / ".git").rglob("*")} == before


def test_plain_folder_is_named_by_its_content(tmp_path: Path, destination: Path) -> None:
    names = []
    for number, text in enumerate(["same", "same", "other"]):
        plain = tmp_path / f"plain{number}"
        (plain / "__pycache__").mkdir(parents=True)
        (plain / "__pycache__" / "x.pyc").write_text(str(number))
        (plain / "model.py").write_text(text)
        names.append(fetch(str(plain), None, destination).commit)
        assert contents(destination) == {"model.py": text}
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("tree-") for name in names)


# what is not there, or must not come in


def test_missing_folder_is_said(tmp_path: Path, destination: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        fetch(f"{tmp_path}/nowhere", None, destination)
    assert str(caught.value) == (
        f"there is no folder '{tmp_path}/nowhere' - give an existing folder, or a URL such as https://HOST/REPO"
    )


def test_repository_on_a_host_that_is_away_is_said(destination: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        fetch("https://127.0.0.1:1/repo.git", None, destination)
    assert str(caught.value) == (
        "the host of 'https://127.0.0.1:1/repo.git' cannot be reached - "
        "check the address and the network, then try again"
    )


@pytest.mark.parametrize(
    "source",
    [
        "https://somebody:hush@127.0.0.1:1/repo.git",
        "HTTPS://somebody:hush@127.0.0.1:1/repo.git",
        "https://somebody:a@hush@127.0.0.1:1/repo.git",
        "https://127.0.0.1:1/repo.git?token=hush",
        "http://somebody:hush@127.0.0.1:1/repo.git",
        "ftp://somebody:hush@127.0.0.1:1/repo.git",
    ],
)
def test_no_message_holds_a_password(source: str, destination: Path) -> None:
    told: list[str] = []
    with pytest.raises(FlopsError) as caught:
        fetch(source, None, destination, told.append)
    assert "hush" not in "".join([str(caught.value), *told])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "'' is no repository - give an https, ssh or file URL, or a folder"),
        (
            "--upload-pack=x",
            "'--upload-pack=x' is no repository - give an https, ssh or file URL, or a folder",
        ),
        (
            "ext::sh -c id",
            "'ext::sh -c id' uses a protocol that is not allowed - "
            "use an https, ssh or file URL, or a folder",
        ),
        ("http://host/repo", "'http://host/repo' is not encrypted - use https://"),
        ("file://host/repo", "'file://host/repo' names a host - write file URLs as file:///FOLDER"),
    ],
)
def test_source_that_git_must_not_see_is_refused(source: str, message: str, destination: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        fetch(source, None, destination)
    assert str(caught.value) == message


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "../content/x", "sub/../../tree/x"])
@pytest.mark.parametrize("ref", [None, "main"])
def test_symbolic_link_that_leaves_the_repository_is_refused(
    repository: "Repository", destination: Path, target: str, ref: str | None
) -> None:
    (repository.path / "link").symlink_to(target)
    repository.write({"sub/x.py": ""})
    repository.commit()
    with pytest.raises(InvalidInputError) as caught:
        fetch(str(repository.path), ref, destination)
    assert str(caught.value) == (
        f"'{repository.path}' has a symbolic link that leaves it: link -> {target} - "
        "put the file itself into the repository"
    )
    assert not destination.exists()
    assert leftovers(destination.parent) == []


def test_symbolic_link_inside_the_repository_is_kept(repository: "Repository", destination: Path) -> None:
    (repository.path / "again.py").symlink_to("model.py")
    repository.commit()
    fetch(str(repository.path), None, destination)
    assert (destination / "again.py").readlink() == Path("model.py")


@pytest.mark.parametrize("ref", [None, "main"])
@pytest.mark.parametrize("limits", [Limits(max_files=1), Limits(max_bytes=1 << 20)])
def test_repository_over_the_limits_is_refused(
    repository: "Repository", destination: Path, ref: str | None, limits: Limits
) -> None:
    repository.write({"big.bin": "0" * (2 << 20)})
    repository.commit()
    source = str(repository.path)
    with pytest.raises(InvalidInputError) as caught:
        fetch(source, ref, destination, limits=limits)
    shown = source if ref is None else repository.path.as_uri()
    assert str(caught.value) == (
        f"'{shown}' is larger than {limits.max_bytes >> 20} MiB or {limits.max_files} files - "
        "keep data and results out of the repository"
    )


# whole or not at all


def test_failed_fetch_leaves_the_former_checkout(repository: "Repository", destination: Path) -> None:
    fetch(str(repository.path), None, destination)
    with pytest.raises(NotFoundError):
        fetch(str(repository.path), "nothing", destination)
    assert contents(destination) == {"model.py": "first\n"}


def test_new_fetch_replaces_the_former_checkout_wholly(repository: "Repository", destination: Path) -> None:
    destination.mkdir(parents=True)
    (destination / "old.py").write_text("old")
    fetch(str(repository.path), None, destination)
    assert contents(destination) == {"model.py": "first\n"}


def test_cancelled_fetch_ends_and_leaves_nothing(repository: "Repository", destination: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    repository.write({"big.bin": "0" * (20 << 20)})  # so that git is still at work when it is looked at
    repository.commit()
    with pytest.raises(FailedError, match="was stopped on request"):
        fetch(repository.path.as_uri(), "main", destination, lambda _: None, cancel=cancel)
    assert not destination.exists()
    assert leftovers(destination.parent) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from flops.repo import fetch
def progress(message):
    if message.startswith("fetched commit"):
        os.kill(os.getpid(), signal.SIGKILL)
fetch(sys.argv[1], "main", Path(sys.argv[2]), progress)
"""


def test_fetch_that_was_killed_can_be_repeated(repository: "Repository", destination: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(repository.path), str(destination)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not destination.exists()
    fetch(str(repository.path), "main", destination)
    assert contents(destination) == {"model.py": "first\n"}
    assert leftovers(destination.parent) == []
