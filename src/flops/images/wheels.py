"""Packages laid down from wheels for any platform, and what of them goes into an image.

uv unpacks wheels into a folder, with hard links from its cache; nothing is executed, so the platform does not
matter. Left out are: tests that nothing outside of tests imports, headers, sources of extension modules and
static libraries (no compiler is in the images), and what tells one machine from another (scripts with its
paths, uv's own notes). What is left is the same, byte by byte, wherever it was laid down.
"""

import configparser
import fnmatch
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flops.core.errors import InvalidInputError
from flops.images import uv
from flops.images.layer import Entry
from flops.images.locks import Lock
from flops.images.pip_configuration import PipConfiguration
from flops.images.platforms import uv_arguments

TRIM = 2
"""Changes with the rules of what is left out: layers made under other rules are not reused."""

_TIMEOUT_S = 3600.0
_LEFT_S = 2 * _TIMEOUT_S
_PREFIX = "wheels-"
_TESTS = "tests"
_BUILD_ONLY = frozenset(
    {".a", ".cc", ".cmake", ".cpp", ".cuh", ".cxx", ".h", ".hpp", ".hxx", ".lib", ".pxd", ".pxi", ".pyx"}
)
# These compile while they run, from headers that they bring.
_COMPILING = frozenset(
    {"cupy", "cupy_backends", "cupyx", "numba_cuda", "nvidia", "triton", "tilelang", "pycuda"}
)
_STRAY = frozenset({".lock", "CACHEDIR.TAG", ".gitignore"})
# The index that a package came from, and when: not the same everywhere.
_NOTES = frozenset({"uv_cache.json", "uv_build.json", "INSTALLER", "REQUESTED", "direct_url.json"})
_LIBRARY = re.compile(r"\.so(\.[\w.]+)?$")
_SHARED = 1 << 16
_CACHE = "__pycache__"
_TEST_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+(?P<dots>\.*)(?P<base>[\w.]*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n#;]*)"
    rb"|import[ \t]+(?P<modules>[^\n#;]+))",
    re.MULTILINE,
)
_ENTRY_POINT = re.compile(r"\s*([\w.]+)\s*:\s*([\w.]+)\s*(?:\[.*\])?\s*")
_SCRIPT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SCRIPT = """#!{python}
import sys
from {module} import {top}
if __name__ == "__main__":
    sys.exit({attribute}())
"""


@contextmanager
def laid_down(
    lock: Lock,
    scratch: Path,
    *,
    configuration: PipConfiguration,
    known: bool = False,
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Path]:
    """A folder with the packages of an image's lock; gone when the block ends. Nothing of them was executed.

    Args:
        scratch: where the folder is made: on the file system of uv's cache it costs links and no copies.
        known: this was laid down before: what is in uv's cache is tried first, with no index asked.
    Raises:
        UnavailableError: a package could not be fetched.
        InvalidInputError: a package has no wheel for the lock's platform any more.
        FailedError: uv failed otherwise, no space is left, or ``cancel`` was set.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    _clear(scratch)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=_PREFIX) as name:
        target = Path(name) / "site"
        target.mkdir()
        if lock.packages:
            requirements = Path(name) / "lock.txt"
            requirements.write_text(lock.text, encoding="utf-8")
            arguments = [
                *["pip", "install", "--no-deps", "--only-binary", ":all:"],
                *uv_arguments(lock.platform, lock.python),
                *configuration.uv_arguments(),
                *["--target", str(target), "--requirements", str(requirements)],
            ]
            variables = configuration.uv_environment(environment)

            def run(more: list[str], tell: uv.Progress | None) -> uv.Finished:
                return uv.run(
                    [*arguments, *more],
                    environment=variables,
                    timeout_s=_TIMEOUT_S,
                    progress=tell,
                    cancel=cancel,
                )

            finished = run(["--offline"], None) if known else run([], progress)
            if finished.returncode and known:
                finished = run([], progress)
            elif finished.network_failed:
                offline = run(["--offline"], None)
                finished = finished if offline.returncode else offline
            if finished.returncode:
                raise uv.failure(finished, f"laying down the packages for {lock.platform}")
        yield target


def _clear(scratch: Path) -> None:
    """Remove what calls left that were killed."""
    for left in scratch.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)


def site_packages(place: str, python: str) -> str:
    """Where an environment in an image has its packages."""
    return f"{place}/lib/python{python}/site-packages"


class Packages:
    """What of laid down packages goes into an image.

    Args:
        site: the folder of `laid_down`.
        unused: patterns of further paths to leave out; ``*`` also stands for slashes.
    """

    def __init__(self, site: Path, unused: Sequence[str] = ()) -> None:
        self._site = site
        found = list(_files(str(site)))
        kept_tests = _imported_tests(str(site), found)
        more = re.compile("|".join(map(fnmatch.translate, unused)) or r"(?!)")
        self._programs = [name for name in found if name.startswith("bin/")]
        self._kept = {
            name
            for name in found
            if not (name.startswith("bin/") or _is_left_out(name, kept_tests) or more.match(name))
        }

    def entries(
        self,
        place: str,
        python: str,
        shared: Mapping[str, str] | None = None,
        shared_place: str = "",
    ) -> Iterator[Entry]:
        """As they come to lie in an image.

        Args:
            place: the environment in the image, such as ``/opt/user``.
            python: its version, such as ``3.11``.
            shared: the `libraries` of another environment in the image; equal ones become links to them, so
                that they are stored, sent and loaded into memory once.
            shared_place: where that is.
        Raises:
            InvalidInputError: a package is malformed.
        """
        packages = site_packages(place, python)
        there = shared or {}
        mine = self.libraries() if there else {}
        for name in sorted(self._kept):
            path = self._site / name
            if name in mine and there.get(name) == mine[name]:
                yield Entry.link(f"{packages}/{name}", f"{site_packages(shared_place, python)}/{name}")
                continue
            if name.endswith(".dist-info/RECORD"):
                yield Entry.file(f"{packages}/{name}", self._record(path))
                continue
            if name.endswith(".dist-info/entry_points.txt"):
                yield from _console_scripts(path, place)
            yield Entry.copy(f"{packages}/{name}", path)
        for name in self._programs:  # those that uv made from entry points have paths of this machine
            path = self._site / name
            with path.open("rb") as file:
                head = file.read(2)
            if head != b"#!":
                yield Entry.copy(f"{place}/{name}", path, mode=0o755)

    def sources(self) -> list[str]:
        """The Python modules, by their paths below the folder."""
        return sorted(name for name in self._kept if name.endswith(".py"))

    def libraries(self) -> dict[str, str]:
        """Compiled libraries worth sharing, by their paths, with what their packages' RECORD says of each."""
        found: dict[str, str] = {}
        for record in sorted(self._site.glob("*.dist-info/RECORD")):
            for line in record.read_text(encoding="utf-8").splitlines():
                name, _, content = line.partition(",")
                size = content.rpartition(",")[2]
                if name in self._kept and _LIBRARY.search(name) and size.isdecimal() and int(size) >= _SHARED:
                    found[name] = content
        return found

    def _record(self, record: Path) -> bytes:
        """The list of a package's files, less what is left out."""
        lines = record.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.rsplit(",", 2)[0].strip('"') in self._kept]
        return "".join(f"{line}\n" for line in sorted(kept)).encode()


def _files(site: str) -> Iterator[str]:
    """Paths of all files below a folder, from there."""
    for folder, folders, names in os.walk(site):
        folders[:] = [name for name in folders if name != _CACHE]
        below = folder[len(site) + 1 :]
        yield from (f"{below}/{name}" if below else name for name in names)


def _is_left_out(name: str, kept_tests: frozenset[str]) -> bool:
    parts = name.split("/")
    if len(parts) == 1:
        return name in _STRAY
    if parts[0].endswith(".dist-info"):
        return parts[-1] in _NOTES
    if _TESTS in parts[1:-1] and "/".join(parts[: parts.index(_TESTS, 1) + 1]) not in kept_tests:
        return True
    return os.path.splitext(name)[1] in _BUILD_ONLY and parts[0] not in _COMPILING  # noqa: PTH122 - many


def _imported_tests(site: str, names: Iterable[str]) -> frozenset[str]:
    """Folders of tests that a module outside of tests imports from."""
    found: set[str] = set()
    for name in names:
        if name.endswith(".py") and f"/{_TESTS}/" not in name:
            with open(f"{site}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 - there are thousands
                content = file.read()
            if b"tests" in content:
                found |= _tests_named(content, name)
    return frozenset(found)


def _tests_named(content: bytes, name: str) -> set[str]:
    found = set()
    for match in _TEST_IMPORT.finditer(content):
        text = match[0].decode("utf-8", "replace")
        if _TESTS not in text:
            continue
        if match["modules"] is not None:
            modules = re.findall(r"[\w.]+", match["modules"].decode("utf-8", "replace"))
        else:
            above = name.split("/")[:-1]
            up = len(match["dots"])
            start = above[: len(above) - up + 1] if up else []
            base = [*start, *filter(None, match["base"].decode("utf-8", "replace").split("."))]
            imported = re.findall(r"\w+", match["names"].decode("utf-8", "replace"))
            modules = [".".join([*base, last]) for last in imported]
        for module in modules:
            parts = module.split(".")
            if _TESTS in parts[1:]:
                found.add("/".join(parts[: parts.index(_TESTS, 1) + 1]))
    return found


def _console_scripts(information: Path, place: str) -> Iterator[Entry]:
    parser = configparser.RawConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names of programs differ in case
    try:
        parser.read_string(information.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        name = information.parent.name
        raise InvalidInputError(
            f"{name} has entry points that cannot be read - pin another version"
        ) from error
    if not parser.has_section("console_scripts"):
        return
    for name, target in sorted(parser.items("console_scripts")):
        match = _ENTRY_POINT.fullmatch(target)
        if match and _SCRIPT_NAME.fullmatch(name):
            text = _SCRIPT.format(
                python=f"{place}/bin/python",
                module=match[1],
                top=match[2].partition(".")[0],
                attribute=match[2],
            )
            yield Entry.file(f"{place}/bin/{name}", text.encode(), mode=0o755)
