"""Base images made from Debian's packages: equal, small, and their Python works, for every platform."""

import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from flops.core.errors import FailedError, InvalidInputError, UnavailableError
from flops.images import debian
from flops.images.base import PACKAGES, made_bases, make_base
from flops.images.base_image import BaseImage
from flops.images.layer import MTIME
from flops.images.layout import Layout
from tests.conftest import Require

BOTH = ("linux/amd64", "linux/arm64")
PROGRAM = """
import bz2, ctypes, hashlib, lzma, os, pwd, sqlite3, ssl, subprocess, uuid, zlib, zoneinfo
assert os.getuid() == 10001 or not os.getuid(), os.getuid()
assert len(ssl.create_default_context().get_ca_certs()) > 100
assert zoneinfo.ZoneInfo("Europe/Berlin")
assert ssl.__cached__ and os.path.exists(ssl.__cached__)
answer = sqlite3.connect(":memory:").execute("select 7").fetchone()[0]
print(os.uname().machine, pwd.getpwuid(10001).pw_dir, answer)
"""


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(tmp_path_factory.mktemp("bases") / "images")


@pytest.fixture(scope="session")
def bases(layout: Layout, require: Require) -> Mapping[str, BaseImage]:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    return make_base(layout)


@pytest.fixture(scope="session")
def roots(
    layout: Layout, bases: Mapping[str, BaseImage], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """Both, unpacked."""
    place = tmp_path_factory.mktemp("roots")
    for folder in (place, *list(place.parents)[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)  # user 10001 must get there
    result = {}
    for platform, base in bases.items():
        result[platform] = place / platform.replace("/", "-")
        for layer in base.layers:
            result[platform].mkdir(exist_ok=True)
            unpack = (
                "tar",
                "--extract",
                "--gzip",
                "--numeric-owner",
                "--file",
                str(layout.path(layer.digest)),
            )
            subprocess.run([*unpack, "--directory", str(result[platform])], check=True)
    return result


@pytest.mark.network
@pytest.mark.slow
def test_both_platforms_have_python_and_are_small(layout: Layout, bases: Mapping[str, BaseImage]) -> None:
    assert set(bases) == set(BOTH)
    for base in bases.values():
        assert (base.python, base.python_version) == ("/usr/bin/python3.11", "3.11")
        assert sum(layer.size for layer in base.layers) < 30 << 20
        said = layout.read_json(base.manifest)["annotations"][PACKAGES]
        assert "libpython3.11-stdlib=3.11." in said
        assert "dpkg=" not in said


@pytest.mark.network
@pytest.mark.slow
def test_layers_hold_nothing_that_depends_on_when_or_where_they_were_made(
    layout: Layout, bases: Mapping[str, BaseImage]
) -> None:
    for base in bases.values():
        with tarfile.open(layout.path(base.layers[0].digest)) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(MTIME, 0, 0, "", "")}
        names = [m.name.split("/") for m in members]
        assert names == sorted(names)
        assert len({m.name for m in members}) == len(members)
        assert sum(m.size for m in members) < 84_000_000
        assert all(m.isreg() or m.isdir() or m.issym() or m.islnk() for m in members)
        assert not [m.name for m in members if m.mode & 0o6000]
        assert not [m.name for m in members if m.isreg() and m.mode & 0o022]


@pytest.mark.network
@pytest.mark.slow
def test_equal_packages_give_equal_digests(bases: Mapping[str, BaseImage], tmp_path: Path) -> None:
    again = make_base(Layout(tmp_path / "elsewhere"), platforms=["linux/arm64"])
    assert again["linux/arm64"].manifest == bases["linux/arm64"].manifest


@pytest.mark.network
@pytest.mark.slow
def test_what_was_made_is_found_again(layout: Layout, bases: Mapping[str, BaseImage]) -> None:
    told: list[str] = []
    assert make_base(layout, progress=told.append) == bases
    assert told == []
    assert list(made_bases(layout)) == ["bookworm"]


@pytest.mark.network
@pytest.mark.slow
def test_python_works_as_a_user_on_a_read_only_root(roots: Mapping[str, Path], require: Require) -> None:
    require(os.getuid() == 0 and shutil.which("unshare") is not None, "root")
    script = (
        'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && '
        'exec chroot --userspec=10001:10001 "$1" /usr/bin/python3 -c "$2"'
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(roots["linux/amd64"])]
    done = subprocess.run([*command, PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("x86_64 /tmp 7\n", "")
    done = subprocess.run([*command, "open('/tmp/x', 'w')"], capture_output=True, text=True, timeout=60)
    assert "Read-only file system" in done.stderr


@pytest.mark.network
@pytest.mark.slow
def test_python_works_on_the_other_processor(roots: Mapping[str, Path], require: Require) -> None:
    qemu = shutil.which("qemu-aarch64-static")
    require(qemu is not None and os.getuid() == 0, "qemu-aarch64-static and root")
    root = roots["linux/arm64"]
    shutil.copy(str(qemu), root / "qemu")
    command = ["chroot", "--userspec=10001:10001", str(root), "/qemu", "/usr/bin/python3", "-c", PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        (root / "qemu").unlink()
    assert (done.stdout, done.stderr) == ("aarch64 /tmp 7\n", "")


def test_a_machine_without_mmdebstrap_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"apt install mmdebstrap.*FLOPS_BASE_IMAGE"):
        make_base(Layout(tmp_path / "images"))


def test_what_is_no_platform_or_suite_is_refused(tmp_path: Path, require: Require) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    layout = Layout(tmp_path / "images")
    with pytest.raises(InvalidInputError, match="platform 'linux/sparc'"):
        make_base(layout, platforms=["linux/sparc"])
    with pytest.raises(InvalidInputError, match="'--version' is not a Debian suite"):
        make_base(layout, "--version")
    with pytest.raises(InvalidInputError, match="needs a platform"):
        make_base(layout, platforms=[])
    assert layout.tags() == {}


@pytest.mark.network
@pytest.mark.slow
def test_a_suite_that_does_not_exist_is_named(tmp_path: Path, require: Require) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    with pytest.raises(InvalidInputError, match="no suite 'bookwyrm'"):
        make_base(Layout(tmp_path / "images"), "bookwyrm", ["linux/amd64"])


@pytest.mark.slow
@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9/debian", "http://mirror.invalid/debian"])
def test_a_mirror_that_is_away_is_said(tmp_path: Path, require: Require, mirror: str) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    with pytest.raises(UnavailableError, match="mirror could not be reached"):
        make_base(Layout(tmp_path / "images"), "bookworm", ["linux/amd64"], mirror=mirror)


def test_processes_that_ask_at_the_same_time_share_one_making(tmp_path: Path, require: Require) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    program = (
        "import sys; from pathlib import Path; from flops.images.base import make_base;"
        " from flops.images.layout import Layout;"
        " make_base(Layout(Path(sys.argv[1])), platforms=['linux/amd64'], progress=print)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "images")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = sorted(process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert told[0].startswith("unpacking Debian")
    assert told[1] == "waiting: the same base image is being made for another project\n"


def test_making_one_can_be_stopped(tmp_path: Path, require: Require) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    cancel = threading.Event()
    cancel.set()
    layout = Layout(tmp_path / "images")
    with pytest.raises(FailedError, match="stopped on request"):
        make_base(layout, cancel=cancel)
    assert layout.tags() == {}
