"""An OCI image layout: whole blobs, names, and what is collected; read by another program too."""

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flops.core.errors import FailedError, InvalidInputError, NotFoundError
from flops.images.base_image import PYTHON_VERSION, manifest_for, read_base
from flops.images.descriptor import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
)
from flops.images.layout import Layout
from tests.conftest import Require

HELLO = "sha256:" + hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "images")


def _image(layout: Layout, platform: str = "linux/amd64", **annotations: str) -> Descriptor:
    system, architecture = platform.split("/")
    layer = layout.add(b"no tar, but a blob")
    config = layout.add_json(
        {
            "os": system,
            "architecture": architecture,
            "rootfs": {"type": "layers", "diff_ids": [layer]},
            "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "PYTHON_VERSION=3.12.4"]},
        },
        OCI_CONFIG,
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [Descriptor(OCI_LAYER_GZIP, layer, 18).to_json()],
        "annotations": annotations,
    }
    return layout.add_json(manifest, OCI_MANIFEST, platform=platform)


def _index(layout: Layout, *manifests: Descriptor) -> Descriptor:
    listed = [manifest.to_json() for manifest in manifests]
    return layout.add_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}, OCI_INDEX)


def test_blob_lies_under_its_digest(layout: Layout) -> None:
    assert layout.add(b"hello") == HELLO
    assert (layout.has(HELLO), layout.read(HELLO)) == (True, b"hello")
    assert layout.path(HELLO).read_bytes() == b"hello"


def test_blob_that_is_not_there(layout: Layout) -> None:
    assert not layout.has(HELLO)
    with pytest.raises(NotFoundError):
        layout.read(HELLO)


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "md5:abc", "", HELLO.upper(), HELLO + "/"])
def test_only_digests_reach_the_disk(layout: Layout, digest: str) -> None:
    with pytest.raises(InvalidInputError):
        layout.path(digest)


def test_damaged_blob_is_not_read(layout: Layout) -> None:
    layout.add(b"hello")
    layout.path(HELLO).write_bytes(b"hullo")
    with pytest.raises(FailedError, match="damaged"):
        layout.read(HELLO)


def test_large_blob_is_no_document(layout: Layout) -> None:
    with pytest.raises(InvalidInputError):
        layout.read(layout.add(b"x" * 101), limit_bytes=100)


def test_blob_written_piece_by_piece(layout: Layout) -> None:
    with layout.writer() as writer:
        writer.write(b"hel")
        writer.write(memoryview(b"lo"))
        assert writer.commit(HELLO) == (HELLO, 5)
    assert layout.read(HELLO) == b"hello"


def test_blob_with_another_digest_than_announced_is_thrown_away(layout: Layout) -> None:
    with layout.writer() as writer:
        writer.write(b"hullo")
        with pytest.raises(FailedError, match="damaged or changed"):
            writer.commit(HELLO)
    assert [path for path in layout.folder.rglob("*") if path.is_file()] == [layout.folder / "oci-layout"]


def test_tags_are_kept_moved_and_taken_away(layout: Layout) -> None:
    first, second = _image(layout), _image(layout, "linux/arm64")
    layout.tag("learner:1", first)
    layout.tag("learner:2", first)
    layout.tag("learner:1", second)
    assert layout.resolve("learner:1") == second
    assert dict(Layout(layout.folder).tags()) == {"learner:1": second, "learner:2": first}
    layout.untag("learner:1")
    layout.untag("learner:1")
    with pytest.raises(NotFoundError):
        layout.resolve("learner:1")


@pytest.mark.parametrize("name", ["", "-x", "a b", "a\n", "x" * 300])
def test_impossible_tags(layout: Layout, name: str) -> None:
    with pytest.raises(InvalidInputError):
        layout.tag(name, _image(layout))


def test_tag_of_a_missing_image(layout: Layout) -> None:
    with pytest.raises(NotFoundError):
        layout.tag("x", Descriptor(OCI_MANIFEST, HELLO, 5))


def test_tags_set_by_many_threads_all_stay(layout: Layout) -> None:
    image = _image(layout)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: layout.tag(f"t{n}", image), range(40)))
    assert len(layout.tags()) == 40


def test_damaged_index_is_said(layout: Layout) -> None:
    layout.tag("x", _image(layout))
    (layout.folder / "index.json").write_text("{")
    with pytest.raises(FailedError, match=r"index\.json is damaged"):
        layout.tags()


def test_collect_keeps_what_names_lead_to(layout: Layout) -> None:
    manifests = _image(layout), _image(layout, "linux/arm64")
    index = _index(layout, *manifests)
    layout.tag("both", index)
    lost = layout.add(b"nobody refers to this")
    for path in (layout.folder / "blobs" / "sha256").iterdir():
        os.utime(path, (0, 0))
    assert layout.collect() == 21
    assert not layout.path(lost).exists()
    assert all(layout.path(manifest.digest).exists() for manifest in manifests)
    layout.untag("both")
    assert layout.has(index.digest)
    assert layout.collect() > 0
    assert layout.has(index.digest), "somebody asked for it just now"
    assert layout.collect(kept_s=-1) == index.size
    assert list((layout.folder / "blobs" / "sha256").iterdir()) == []


def test_base_is_read_for_its_platform(layout: Layout) -> None:
    amd64, arm64 = _image(layout), _image(layout, "linux/arm64", **{PYTHON_VERSION: "3.11"})
    index = _index(layout, amd64, arm64)
    assert manifest_for(layout, index, "linux/arm64") == arm64
    base = read_base(layout, index, "linux/amd64", "python:3.12")
    assert (base.manifest, base.python, base.python_version) == (amd64, "/usr/local/bin/python3.12", "3.12")
    assert base.environment[0].startswith("PATH=")
    assert read_base(layout, index, "linux/arm64", "ours").python_version == "3.11"


def test_base_for_another_platform_is_an_error_that_names_both(layout: Layout) -> None:
    image = _image(layout)
    for descriptor in (image, _index(layout, image)):
        with pytest.raises(InvalidInputError, match=r"made for linux/amd64, linux/arm64 is asked for"):
            read_base(layout, descriptor, "linux/arm64", "x")


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"mediaType": OCI_MANIFEST, "digest": HELLO},
        {"mediaType": OCI_MANIFEST, "digest": "sha256:12", "size": 5},
        {"mediaType": OCI_MANIFEST, "digest": HELLO, "size": -1},
        {"mediaType": OCI_MANIFEST, "digest": HELLO, "size": True},
        {"mediaType": "text", "digest": HELLO, "size": 5},
        {"mediaType": OCI_MANIFEST, "digest": HELLO, "size": 5, "platform": {"os": "../x"}},
        {"mediaType": OCI_MANIFEST, "digest": HELLO, "size": 5, "annotations": {"a": 1}},
        {"mediaType": OCI_MANIFEST, "digest": HELLO, "size": 5, "artifactType": 7},
    ],
)
def test_what_is_no_descriptor(value: object) -> None:
    with pytest.raises(InvalidInputError):
        Descriptor.from_json(value)


def test_descriptor_survives_its_document() -> None:
    value = Descriptor(OCI_MANIFEST, HELLO, 5, "linux/arm/v7", {"a": "b"}, "application/x")
    assert Descriptor.from_json(value.to_json()) == value
    arm64 = {
        **Descriptor(OCI_MANIFEST, HELLO, 5).to_json(),
        "platform": {"os": "linux", "architecture": "arm64"},
    }
    assert Descriptor.from_json(arm64).platform == "linux/arm64"
    arm64["platform"]["variant"] = "v8"
    assert Descriptor.from_json(arm64).platform == "linux/arm64"


def test_skopeo_reads_it(layout: Layout, require: Require) -> None:
    require(shutil.which("skopeo") is not None, "skopeo")
    layout.tag("image:1", _image(layout))
    subprocess.run(["skopeo", "inspect", f"oci:{layout.folder}:image:1"], check=True, capture_output=True)
