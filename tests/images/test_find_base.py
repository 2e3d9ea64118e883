"""Which base is taken: one that was named, one of a registry, or one made here; a real registry answers."""

import gzip
import hashlib
import io
import shutil
import struct
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from flops.core.errors import InvalidInputError, NotFoundError, UnavailableError
from flops.images import base as base_module
from flops.images import debian
from flops.images.base import find_base, make_base
from flops.images.descriptor import OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor
from flops.images.layout import Layout
from flops.images.push import push
from flops.images.references import Reference
from tests.conftest import Require
from tests.registries import running_registry

BOTH = ("linux/amd64", "linux/arm64")
MACHINES = {"amd64": 62, "arm64": 183}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[str]:
    require(shutil.which("docker-registry") is not None, "docker-registry")
    with running_registry(tmp_path_factory.mktemp("registry")) as process:
        yield process.host


def python_image(
    layout: Layout, version: str, platforms: Sequence[str] = BOTH, machines: Mapping[str, int] = MACHINES
) -> Descriptor:
    """In the form of the public ``python`` images, as small as can be."""
    manifests = []
    for platform in platforms:
        architecture = platform.split("/")[1]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            content = struct.pack("<4sBB10xHH", b"\x7fELF", 2, 1, 2, machines[architecture])
            info = tarfile.TarInfo(f"usr/local/bin/python{version.rpartition('.')[0]}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        plain = buffer.getvalue()
        packed = gzip.compress(plain, mtime=0)
        config = {
            "os": "linux",
            "architecture": architecture,
            "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin", f"PYTHON_VERSION={version}"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain).hexdigest()}"]},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": layout.add_json(config, OCI_CONFIG).to_json(),
            "layers": [Descriptor(OCI_LAYER_GZIP, layout.add(packed), len(packed)).to_json()],
        }
        manifests.append(layout.add_json(manifest, OCI_MANIFEST, platform=platform).to_json())
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    return layout.add_json(index, OCI_INDEX)


@pytest.fixture
def source(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "source")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "images")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known yet of who answers."""
    monkeypatch.setattr(base_module, "_answering", {})


def publish(source: Layout, registry: str, name: str, image: Descriptor) -> str:
    push(source, image, Reference.parse(f"{registry}/{name}"))
    return f"{registry}/{name}"


def test_the_image_that_is_named_is_pulled_for_the_wanted_python(
    registry: str, source: Layout, layout: Layout
) -> None:
    publish(source, registry, "python:3.12-slim", python_image(source, "3.12.4"))
    warnings: list[str] = []
    found = find_base(
        layout, python=">=3.12,<3.13", wanted=f"{registry}/python:{{python}}-slim", warn=warnings.append
    )
    assert {p: (b.python, b.python_version) for p, b in found.items()} == dict.fromkeys(
        BOTH, ("/usr/local/bin/python3.12", "3.12")
    )
    assert found["linux/arm64"].source == f"{registry}/python:3.12-slim"
    assert warnings == []


def test_what_was_pulled_is_kept_until_asked_anew(registry: str, source: Layout, layout: Layout) -> None:
    wanted = publish(source, registry, "kept:1", python_image(source, "3.11.1"))
    first = find_base(layout, ["linux/amd64"], wanted=wanted)
    publish(source, registry, "kept:1", python_image(source, "3.11.2"))
    told: list[str] = []
    assert find_base(layout, ["linux/amd64"], wanted=wanted, progress=told.append) == first
    assert told == []
    renewed = find_base(layout, ["linux/amd64"], wanted=wanted, refresh=True)
    assert renewed["linux/amd64"].manifest != first["linux/amd64"].manifest
    assert set(find_base(layout, BOTH, wanted=wanted)) == set(BOTH)  # the other one is fetched on top


def test_another_python_than_the_wanted_one_is_used_with_a_warning(
    registry: str, source: Layout, layout: Layout
) -> None:
    wanted = publish(source, registry, "fixed:1", python_image(source, "3.11.9"))
    warnings: list[str] = []
    find_base(layout, ["linux/amd64"], python="==3.9.18", wanted=wanted, warn=warnings.append)
    assert len(warnings) == 1
    assert (
        f"Python 3.9.18 is asked for; base image {wanted} for linux/amd64 has 3.11, which is" in warnings[0]
    )
    find_base(layout, ["linux/amd64"], python="==3.11.4", wanted=wanted, warn=warnings.append)
    assert len(warnings) == 1


def test_an_image_without_the_platform_is_refused(registry: str, source: Layout, layout: Layout) -> None:
    wanted = publish(source, registry, "one:1", python_image(source, "3.11.9", ["linux/amd64"]))
    with pytest.raises(InvalidInputError, match=r"no linux/arm64, only linux/amd64 - name an image that has"):
        find_base(layout, BOTH, wanted=wanted)


def test_an_image_that_lies_about_its_platform_gets_no_name_here(
    registry: str, source: Layout, layout: Layout
) -> None:
    image = python_image(source, "3.11.9", machines={"amd64": 62, "arm64": 62})
    wanted = publish(source, registry, "liar:1", image)
    with pytest.raises(InvalidInputError, match="its Python is for amd64"):
        find_base(layout, BOTH, wanted=wanted)
    assert layout.tags() == {}


def test_a_named_image_that_is_not_there_is_an_error(registry: str, layout: Layout) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        find_base(layout, wanted=f"{registry}/nowhere:1")


def test_the_public_image_is_the_default(registry: str, source: Layout, layout: Layout) -> None:
    own = f"3.{sys.version_info.minor}"
    publish(source, registry, f"public:{own}", python_image(source, f"{own}.1"))
    found = find_base(layout, public=f"{registry}/public:{{python}}")
    assert {base.source for base in found.values()} == {f"{registry}/public:{own}"}


def test_without_hub_and_mmdebstrap_both_ways_out_are_named(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        find_base(layout, public="127.0.0.1:9/python:{python}")
    assert "registry 127.0.0.1:9 cannot be reached" in str(caught.value)
    assert "apt install mmdebstrap" in str(caught.value)
    assert "FLOPS_BASE_IMAGE" in str(caught.value)
    assert time.monotonic() - begun < 3


@pytest.mark.network
@pytest.mark.slow
def test_without_the_hub_a_base_is_made_here(
    layout: Layout, registry: str, source: Layout, require: Require
) -> None:
    require(debian.find_mmdebstrap() is not None, "mmdebstrap")
    told: list[str] = []
    arm = ["linux/arm64"]
    found = find_base(layout, arm, public="127.0.0.1:9/python:{python}", progress=told.append)
    assert found["linux/arm64"].source == "flops-base:bookworm"
    assert "127.0.0.1:9 cannot be reached; a base image made here is used" in told[0]
    # The same when the registry is there and has no such image; and by name.
    assert find_base(layout, arm, public=f"{registry}/nothing:{{python}}") == found
    assert find_base(layout, arm, wanted="flops-base:bookworm") == found
    assert make_base(layout, platforms=arm) == found
    warnings: list[str] = []
    assert find_base(layout, arm, python="~=3.13", public="127.0.0.1:9/x", warn=warnings.append) == found
    assert "Python ~=3.13 is asked for; base image flops-base:bookworm" in warnings[0]
    # A base of ours keeps its marks on the way through a registry.
    layout_index = layout.resolve("flops-base:bookworm")
    push(layout, layout_index, Reference.parse(f"{registry}/site/base:1"))
    again = find_base(Layout(layout.folder / "second"), arm, wanted=f"{registry}/site/base:1")
    assert again["linux/arm64"].manifest == found["linux/arm64"].manifest
    assert again["linux/arm64"].python == "/usr/bin/python3.11"


def test_what_is_no_reference_or_python_is_refused(layout: Layout) -> None:
    with pytest.raises(InvalidInputError, match="not a Python version"):
        find_base(layout, python="snake")
    with pytest.raises(InvalidInputError):
        find_base(layout, wanted="UPPER/{case}:1")
