"""Archives of code from anywhere are laid down inside their folder, or not at all."""

import io
import tarfile
from pathlib import Path

import pytest

from flops.core.errors import InvalidInputError
from flops.node.code import lay_down
from tests.node.conftest import archive


def _entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, target
        tar.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_entry("/etc/evil"), "called '/etc/evil'"),
        (_entry("../evil"), "called '../evil'"),
        (_entry("a/../../evil"), "called"),
        (_entry(".git/hooks/post-checkout"), "called '.git/hooks"),
        (_entry("/".join("a" * 70)), "called 'a/a"),
        (_entry("x" * 256), "called 'xxx"),
        (_entry("link", tarfile.SYMTYPE, "/etc/passwd"), "'link' in the code is no regular file"),
        (_entry("link", tarfile.LNKTYPE, "model.py"), "'link' in the code is no regular file"),
        (_entry("pipe", tarfile.FIFOTYPE), "'pipe' in the code is no regular file"),
        (_entry("device", tarfile.CHRTYPE), "'device' in the code is no regular file"),
        (b"no archive at all" * 100, "no archive that can be read"),
        (archive({"a": b"x" * 2000})[:1500], "no archive that can be read"),
    ],
)
def test_what_leads_elsewhere_is_not_taken(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "code.tar"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=words.replace("..", r"\.\.")):
        lay_down(file, tmp_path / "code")
    assert [path.name for path in tmp_path.iterdir()] == ["code.tar"]


def test_two_things_of_one_name_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "code.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
        tar.addfile(tarfile.TarInfo("a"))
    file.write_bytes(buffer.getvalue())
    with pytest.raises(InvalidInputError, match="two things of one name"):
        lay_down(file, tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_files_are_private_and_programs_stay_programs(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, mode in (("run.sh", 0o6755), ("model.py", 0o644)):
            entry = tarfile.TarInfo(name)
            entry.mode = mode
            tar.addfile(entry)
    (tmp_path / "code.tar").write_bytes(buffer.getvalue())
    lay_down(tmp_path / "code.tar", tmp_path / "code")
    assert (tmp_path / "code" / "run.sh").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "code" / "model.py").stat().st_mode & 0o7777 == 0o600
