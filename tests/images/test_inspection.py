"""Looking for Python in layers of strangers."""

import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from flops.core.errors import FailedError, InvalidInputError
from flops.images.base_image import BaseImage
from flops.images.descriptor import OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, OCI_MANIFEST, Descriptor
from flops.images.inspection import check_python
from flops.images.layout import Layout

PYTHON = "/usr/local/bin/python3.11"


def elf(machine: int) -> bytes:
    return struct.pack("<4sBB10xHH", b"\x7fELF", 2, 1, 2, machine) + bytes(100)


AMD64, ARM64 = elf(62), elf(183)


@dataclass(frozen=True)
class Link:
    target: str
    hard: bool = False


Files = dict[str, bytes | Link | None]


def tar_of(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, Link):
                info.type = tarfile.LNKTYPE if content.hard else tarfile.SYMTYPE
                info.linkname = content.target
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def base_of(
    layout: Layout, layers: Sequence[Files], platform: str = "linux/amd64", kind: str = OCI_LAYER_GZIP
) -> BaseImage:
    descriptors, diff_ids = [], []
    for files in layers:
        plain = tar_of(files)
        packed = {
            OCI_LAYER: lambda content: content,
            OCI_LAYER_GZIP: gzip.compress,
            OCI_LAYER_ZSTD: zstandard.compress,
        }[kind](plain)
        descriptors.append(Descriptor(kind, layout.add(packed), len(packed)))
        diff_ids.append(f"sha256:{hashlib.sha256(plain).hexdigest()}")
    manifest = Descriptor(OCI_MANIFEST, layout.add(b"{}"), 2)
    return BaseImage(platform, manifest, tuple(descriptors), tuple(diff_ids), (), PYTHON, "3.11", "a/b:1")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "images")


@pytest.mark.parametrize("kind", [OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD])
def test_an_interpreter_is_found_however_the_layer_is_packed(layout: Layout, kind: str) -> None:
    check_python(layout, base_of(layout, [{"etc/x": b"1"}, {PYTHON[1:]: AMD64}], kind=kind))


@pytest.mark.parametrize(
    "layers",
    [
        [{"usr/local/bin/python3.11": Link("/opt/bin/python3.11"), "opt/bin/python3.11": AMD64}],
        [{"usr/local/bin/python3.11": Link("python3.11d"), "usr/local/bin/python3.11d": AMD64}],
        [{"usr/local": Link("../opt/local")}, {"./opt/local/bin/python3.11": AMD64}],
        [{"usr/bin/python3": AMD64, "usr/local/bin/python3.11": Link("usr/bin/python3", hard=True)}],
        [{"usr/local/bin/python3.11": ARM64}, {"usr/local/bin/python3.11": AMD64}],
    ],
)
def test_links_and_later_layers_are_followed(layout: Layout, layers: Sequence[Files]) -> None:
    check_python(layout, base_of(layout, layers))


@pytest.mark.parametrize(
    "layers",
    [
        [{"usr/bin/python3.11": AMD64}],
        [{"usr/local/bin/python3.11": Link("/gone")}],
        [{"usr/local/bin/python3.11": Link("python3.11")}],
        [{PYTHON[1:]: AMD64}, {"usr/local/bin/.wh.python3.11": b""}],
        [{PYTHON[1:]: AMD64}, {"usr/.wh.local": b""}],
        [{PYTHON[1:]: AMD64}, {"usr/local/bin/.wh..wh..opq": b""}],
        [{PYTHON[1:]: None}],
    ],
)
def test_an_interpreter_that_is_not_there_is_said(layout: Layout, layers: Sequence[Files]) -> None:
    with pytest.raises(InvalidInputError, match=r"a/b:1 has no Python at /usr/local/bin/python3.11"):
        check_python(layout, base_of(layout, layers))


def test_an_image_that_says_the_wrong_platform_is_found_out(layout: Layout) -> None:
    check_python(layout, base_of(layout, [{PYTHON[1:]: ARM64}], "linux/arm64"))
    with pytest.raises(InvalidInputError, match=r"made for linux/arm64, its Python is for amd64"):
        check_python(layout, base_of(layout, [{PYTHON[1:]: AMD64}], "linux/arm64"))


def test_layers_that_are_not_what_the_config_promises_are_refused(layout: Layout) -> None:
    good = base_of(layout, [{PYTHON[1:]: AMD64}])
    other = base_of(layout, [{PYTHON[1:]: AMD64, "etc/evil": b""}])
    swapped = BaseImage(
        good.platform, good.manifest, other.layers, good.diff_ids, (), PYTHON, "3.11", "a/b:1"
    )
    with pytest.raises(FailedError, match="does not hold what the image's config says"):
        check_python(layout, swapped)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"x" * 2000, mtime=0)[:-12]],
    ids=["empty", "no gzip", "cut off"],
)
def test_a_damaged_layer_is_said(layout: Layout, content: bytes) -> None:
    good = base_of(layout, [{PYTHON[1:]: AMD64}])
    layer = Descriptor(OCI_LAYER_GZIP, layout.add(content), len(content))
    broken = BaseImage(good.platform, good.manifest, (layer,), good.diff_ids, (), PYTHON, "3.11", "a/b:1")
    with pytest.raises((FailedError, InvalidInputError), match="layer sha256:"):
        check_python(layout, broken)
