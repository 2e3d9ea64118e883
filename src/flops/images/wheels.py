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
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from flops.core.errors import InvalidInputError
from flops.images import uv
from flops.images.layer import Entry
from flops.images.locks import Lock
from flops.images.pip_configuration import PipConfiguration
from flops.images.platforms import uv_arguments

TRIM = 1
"""Changes with the rules of what is left out: layers made under other rules are not reused."""

_TIMEOUT_S = 3600.0
_TESTS = "tests"
_BUILD_ONLY = frozenset({".a", ".h", ".hpp", ".hxx", ".cuh", ".pxd", ".pxi", ".pyx", ".cmake", ".lib"})
# These compile while they run, from headers that they bring.
_COMPILING = frozenset(
    {"cupy", "cupy_backends", "cupyx", "numba_cuda", "nvidia", "triton", "tilelang", "pycuda"}
)
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
    environment: Mapping[str, str] = os.environ,
    progress: uv.Progress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Path]:
    """A folder with the packages of an image's lock; gone when the block ends. Nothing of them was executed.

    Args:
        scratch: where the folder is made: on the file system of uv's cache it costs links and no copies.
    Raises:
        UnavailableError: a package could not be fetched.
        InvalidInputError: a package has no wheel for the lock's platform any more.
        FailedError: uv failed otherwise, no space is left, or ``cancel`` was set.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="wheels-") as name:
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

            finished = run(["--offline"], None)  # what is in uv's cache needs no index
            if finished.returncode:
                finished = run([], progress)
            if finished.returncode:
                raise uv.failure(finished, f"laying down the packages for {lock.platform}")
        yield target


def entries(site: Path, place: str, python: str, unused: Sequence[str] = ()) -> Iterator[Entry]:
    """What of laid down packages goes into an image.

    Args:
        site: the folder of `laid_down`.
        place: the environment in the image, such as ``/opt/user``.
        python: its version, such as ``3.11``.
        unused: patterns of further paths to leave out; ``*`` also stands for slashes.
    """
    packages = site_packages(place, python)
    kept_tests = _imported_tests(site)
    for path, relative in _files(site):
        if relative.parts[0] == "bin":
            yield from _script(path, place, relative)
        elif not _is_left_out(relative, kept_tests) and not any(
            fnmatch.fnmatch(str(relative), pattern) for pattern in unused
        ):
            if relative.name == "RECORD" and relative.parent.name.endswith(".dist-info"):
                yield Entry.file(f"{packages}/{relative}", _record(site, path, kept_tests))
            else:
                yield Entry.copy(f"{packages}/{relative}", path)
    for information in sorted(site.glob("*.dist-info/entry_points.txt")):
        yield from _console_scripts(information, place)


def site_packages(place: str, python: str) -> str:
    """Where an environment in an image has its packages."""
    return f"{place}/lib/python{python}/site-packages"


def sources(site: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    """The Python files that go into an image, with their paths in ``site``."""
    kept_tests = _imported_tests(site)
    for path, relative in _files(site):
        if relative.suffix == ".py" and relative.parts[0] != "bin" and not _is_left_out(relative, kept_tests):
            yield path, relative


def _files(site: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    for folder, folders, names in os.walk(site):
        folders[:] = sorted(name for name in folders if name != _CACHE)
        for name in sorted(names):
            path = Path(folder) / name
            yield path, PurePosixPath(path.relative_to(site))


def _is_left_out(relative: PurePosixPath, kept_tests: frozenset[PurePosixPath]) -> bool:
    parts = relative.parts
    if len(parts) == 1:
        return parts[0] in (".lock", "CACHEDIR.TAG", ".gitignore")
    if parts[0].endswith(".dist-info"):
        # The index that a package came from, and when: not the same everywhere.
        return relative.name in (
            "uv_cache.json",
            "uv_build.json",
            "INSTALLER",
            "REQUESTED",
            "direct_url.json",
        )
    if _TESTS in parts[1:-1]:
        folder = PurePosixPath(*parts[: parts.index(_TESTS, 1) + 1])
        if folder not in kept_tests:
            return True
    return relative.suffix in _BUILD_ONLY and parts[0] not in _COMPILING


def _imported_tests(site: Path) -> frozenset[PurePosixPath]:
    """Folders of tests that a module outside of tests imports from."""
    found: set[PurePosixPath] = set()
    for path, relative in _files(site):
        if relative.suffix == ".py" and _TESTS not in relative.parts:
            content = path.read_bytes()
            if b"tests" in content:
                found |= _tests_named(content, relative)
    return frozenset(found)


def _tests_named(content: bytes, relative: PurePosixPath) -> set[PurePosixPath]:
    found = set()
    for match in _TEST_IMPORT.finditer(content):
        text = match[0].decode("utf-8", "replace")
        if _TESTS not in text:
            continue
        if match["modules"] is not None:
            names = re.findall(r"[\w.]+", match["modules"].decode("utf-8", "replace"))
        else:
            above = relative.parent.parts
            up = len(match["dots"])
            start = above[: len(above) - up + 1] if up else ()
            base = [*start, *filter(None, match["base"].decode().split("."))]
            imported = re.findall(r"\w+", match["names"].decode("utf-8", "replace"))
            names = [".".join([*base, name]) for name in imported]
        for name in names:
            parts = name.split(".")
            if _TESTS in parts[1:]:
                found.add(PurePosixPath(*parts[: parts.index(_TESTS, 1) + 1]))
    return found


def _record(site: Path, record: Path, kept_tests: frozenset[PurePosixPath]) -> bytes:
    """The list of a package's files, less what was left out."""
    kept = []
    for line in record.read_text(encoding="utf-8").splitlines():
        name = line.rsplit(",", 2)[0].strip('"')
        relative = PurePosixPath(name)
        if (
            not relative.parts
            or ".." in relative.parts
            or relative.parts[0] == "bin"
            or _CACHE in relative.parts
        ):
            continue
        if not _is_left_out(relative, kept_tests) and (site / relative).is_file():
            kept.append(line)
    return "".join(f"{line}\n" for line in sorted(kept)).encode()


def _script(path: Path, place: str, relative: PurePosixPath) -> Iterator[Entry]:
    """A program of a package; those that uv made from entry points are made again elsewhere."""
    with path.open("rb") as file:
        head = file.read(2)
    if head != b"#!":
        yield Entry.copy(f"{place}/{relative}", path, mode=0o755)


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
