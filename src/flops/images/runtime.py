"""FLOps' own part of an image: the packages that its programs import, the programs, and what guests import.

The packages have the versions of the running installation, which are the ones that were tested together. They
lie in a layer of their own: a change of FLOps itself is a small layer.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import flops
from flops.core.errors import FailedError, InvalidInputError
from flops.images.base_image import BaseImage
from flops.images.layer import Entry
from flops.images.locks import Lock
from flops.images.wheels import site_packages

PLACE = "/opt/flops"
"""The environment of FLOps' programs."""
USER_PLACE = "/opt/user"
"""The environment of the user's code."""
FORM = "1"
"""Changes with what `skeleton` makes."""
GUEST_PLACE = "/opt/flops-guest"
"""What of FLOps the user's code can import."""

# What the aggregator, the agent and the data server import; tests import them with nothing else. Of the
# requirements of flwr most are left out: they are for its own servers and tools.
DISTRIBUTIONS = (
    *("flwr", "click", "cryptography", "cffi", "grpcio", "grpcio-health-checking", "httpx", "idna"),
    *("iterators", "protobuf", "pycryptodome", "pygments", "rich", "shellingham", "typer"),
    *("typing_extensions", "numpy", "pyarrow"),
)
SERVING = ("h11", "httptools", "orjson", "prometheus-client", "pyyaml", "uvicorn", "uvloop")
"""What the inference server imports besides."""
UNUSED = (
    *("*.pyi", "Crypto/PublicKey/*", "Crypto/SelfTest/*", "numpy/distutils/*", "numpy/f2py/*"),
    *("numpy/_core/_simd.*", "pyarrow/_azurefs*", "pyarrow/_gcsfs*", "pyarrow/_hdfs*", "pyarrow/_orc*"),
    *("pyarrow/_s3fs*", "pyarrow/_*parquet_encryption*", "pyarrow/_dataset_orc*", "pyarrow/_substrait*"),
    *("pyarrow/_pyarrow_cpp_tests*", "pygments/lexers/[a-z]*.py", "pygments/lexers/_*_builtins.py"),
)
"""Patterns of files of these that no program of ours loads."""

_OLDEST_PYTHON = (3, 11)
_PROGRAMS = ("core", "guest", "telemetry", "federation", "agent", "data", "serving")
_GUEST = ("flops_worker", "flops_utils")
_OWNER = 10_001
_SUFFIXES = (".py", ".typed", ".json")
_HOMES = ("/run/flops", "/run/flops/seat", "/run/flops/data", "/var/lib/flops", "/run/secrets")


def lock(platform: str, python: str, distributions: Sequence[str] = DISTRIBUTIONS) -> Lock:
    """Packages of FLOps' programs for an image.

    Raises:
        InvalidInputError: FLOps does not run on that Python.
        FailedError: a package is missing in the running installation.
    """
    if tuple(map(int, python.split("."))) < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        raise InvalidInputError(
            f"the base image for {platform} has Python {python}, FLOps needs {oldest} - use a newer base"
        )
    try:
        pins = [f"{name}=={importlib.metadata.version(name)}" for name in distributions]
    except importlib.metadata.PackageNotFoundError as error:
        raise FailedError(f"package {error.name} of FLOps is missing - install FLOps again") from error
    return Lock.of(python, pins, platform=platform)


def skeleton(base: BaseImage) -> Iterator[Entry]:
    """The folders and interpreters that everything else is put into."""
    yield Entry.folder("/tmp", mode=0o1777)  # noqa: S108 - a path in the image
    for path in _HOMES:
        yield Entry.folder(path, mode=0o700, owner=_OWNER)
    for place in (PLACE, USER_PLACE):
        home = str(PurePosixPath(base.python).parent)
        settings = f"home = {home}\ninclude-system-site-packages = false\nversion = {base.python_version}\n"
        yield Entry.file(f"{place}/pyvenv.cfg", settings.encode())
        for name in ("python", "python3", f"python{base.python_version}"):
            yield Entry.link(f"{place}/bin/{name}", base.python if name == "python" else "python")
        yield Entry.folder(site_packages(place, base.python_version))
    yield Entry.file(
        f"{site_packages(USER_PLACE, base.python_version)}/flops-guest.pth", f"{GUEST_PLACE}\n".encode()
    )


def programs(python: str) -> Mapping[str, bytes]:
    """The files of FLOps' programs, by their paths in an image."""
    root = Path(flops.__file__).parent.parent
    site = site_packages(PLACE, python)
    return {f"{site}/{path.relative_to(root)}": path.read_bytes() for path in program_files()}


def program_files() -> list[Path]:
    """The files of FLOps' programs in the running installation, sorted."""
    root = Path(flops.__file__).parent
    found = [path for path in root.iterdir() if path.suffix in _SUFFIXES]
    for name in _PROGRAMS:
        found += [path for path in (root / name).rglob("*") if path.suffix in _SUFFIXES]
    return sorted([*found, *_guest_files()])


def guest() -> Mapping[str, bytes]:
    """The files that user code finds of FLOps, by their paths in an image."""
    root = Path(flops.__file__).parent.parent
    return {f"{GUEST_PLACE}/{path.relative_to(root)}": path.read_bytes() for path in sorted(_guest_files())}


def digest(files: Mapping[str, bytes]) -> str:
    """Tells one set of files from another."""
    result = hashlib.sha256()
    for path, content in sorted(files.items()):
        result.update(f"{path}\0{len(content)}\0".encode() + content)
    return result.hexdigest()


def _guest_files() -> list[Path]:
    root = Path(flops.__file__).parent.parent
    return [path for name in _GUEST for path in (root / name).glob("*.py")]
