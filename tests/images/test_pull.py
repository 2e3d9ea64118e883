"""Pulls: the wanted platforms, whole or not at all, whatever the registry or its storage does."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.core.disk import DiskFullError
from flops.core.errors import FailedError, InvalidInputError, NotFoundError
from flops.images import pull as pull_module
from flops.images.base_image import manifest_for
from flops.images.descriptor import OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST, Descriptor
from flops.images.layout import Layout
from flops.images.pull import pull
from flops.images.push import push
from flops.images.references import Reference
from flops.images.registry import Registry
from flops.images.registry_service import registry_installed
from tests.conftest import Require
from tests.registries import Asked, RegistryProcess, Reply, can_mount, running_registry, scripted, small_disk

MB = 1 << 20
NO_PAUSES = (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[RegistryProcess]:
    require(registry_installed() is not None, "docker-registry")
    with running_registry(tmp_path_factory.mktemp("registry")) as process:
        yield process


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def fetched(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "fetched")


def _manifest(layout: Layout, platform: str, *layers: bytes) -> Descriptor:
    system, architecture, *variant = platform.split("/")
    config = layout.add_json(
        {"os": system, "architecture": architecture, **({"variant": variant[0]} if variant else {})},
        OCI_CONFIG,
    )
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": config.to_json(),
        "layers": [Descriptor(OCI_LAYER_GZIP, layout.add(layer), len(layer)).to_json() for layer in layers],
    }
    return layout.add_json(document, OCI_MANIFEST, platform=platform)


def _index(layout: Layout, *manifests: Descriptor) -> Descriptor:
    listed = [manifest.to_json() for manifest in manifests]
    return layout.add_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}, OCI_INDEX)


def _blobs(layout: Layout) -> set[str]:
    folder = layout.folder / "blobs" / "sha256"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _half_written(layout: Layout) -> list[Path]:
    folder = layout.folder / "incoming"
    return [path for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []


def test_only_the_wanted_platforms_are_fetched(
    layout: Layout, fetched: Layout, registry: RegistryProcess
) -> None:
    amd64 = _manifest(layout, "linux/amd64", os.urandom(MB))
    arm64 = _manifest(layout, "linux/arm64", os.urandom(MB))
    reference = Reference(registry.host, "two/platforms", "1")
    push(layout, _index(layout, amd64, arm64), reference)
    root = pull(reference, fetched, ["linux/arm64"])
    assert root.media_type == OCI_INDEX
    assert manifest_for(fetched, root, "linux/arm64").digest == arm64.digest
    assert fetched.has(arm64.digest)
    assert not fetched.has(amd64.digest)
    pull(reference, fetched, ["linux/arm64", "linux/amd64"])
    assert fetched.has(amd64.digest)


def test_a_platform_that_is_missing_is_named_with_those_that_are_there(
    layout: Layout, fetched: Layout, registry: RegistryProcess
) -> None:
    amd64 = _manifest(layout, "linux/amd64", b"layer")
    for name, built in (("wrong/index", _index(layout, amd64)), ("wrong/single", amd64)):
        reference = Reference(registry.host, name, "1")
        push(layout, built, reference)
        with pytest.raises(InvalidInputError, match=f"{name}:1 has no linux/arm64, only linux/amd64"):
            pull(reference, fetched, ["linux/amd64", "linux/arm64"])
        assert pull(reference, fetched, ["linux/amd64"]).digest == built.digest


def test_an_image_that_is_not_there_is_not_found(fetched: Layout, registry: RegistryProcess) -> None:
    with pytest.raises(NotFoundError, match=r"not/there:1 is not in image registry"):
        pull(Reference(registry.host, "not/there", "1"), fetched)


def test_a_blob_damaged_in_the_registry_leaves_nothing_half_written(
    layout: Layout, fetched: Layout, registry: RegistryProcess
) -> None:
    content = os.urandom(MB)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    built = _index(layout, _manifest(layout, "linux/amd64", content))
    reference = Reference(registry.host, "damaged/blob", "1")
    push(layout, built, reference)
    stored = registry.blob(digest)

    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FailedError, match=f"damaged/blob:1 cannot be pulled: blob {digest} came with"):
        pull(reference, fetched)
    stored.write_bytes(content[: MB // 2])
    with (
        Registry(registry.host, pauses_s=NO_PAUSES) as client,
        pytest.raises(FailedError, match=f"blob {digest} of damaged/blob is damaged .*{MB // 2} of {MB}"),
    ):
        pull(reference, fetched, registry=client)
    stored.write_bytes(content + b"more")
    with pytest.raises(FailedError, match=f"blob {digest} of damaged/blob has more than"):
        pull(reference, fetched)
    assert not fetched.has(digest)
    assert not fetched.has(built.digest)
    assert _half_written(fetched) == []

    stored.write_bytes(content)
    assert pull(reference, fetched).digest == built.digest


def test_a_manifest_damaged_in_the_registry_is_refused(
    layout: Layout, fetched: Layout, registry: RegistryProcess
) -> None:
    built = _manifest(layout, "linux/amd64", b"layer of a damaged manifest")
    reference = Reference(registry.host, "damaged/manifest", "1")
    push(layout, built, reference)
    stored = registry.blob(built.digest)
    document = json.loads(stored.read_bytes())
    document["layers"] = []
    stored.write_text(json.dumps(document))
    for name in (reference, reference.with_digest(built.digest)):
        with pytest.raises(FailedError, match="was damaged or changed"):
            pull(name, fetched)
    assert _blobs(fetched) == set()


def test_a_registry_that_is_killed_while_sending_is_waited_for(
    layout: Layout, fetched: Layout, registry: RegistryProcess
) -> None:
    content = os.urandom(24 * MB)
    reference = Reference(registry.host, "killed/pull", "1")
    built = _manifest(layout, "linux/amd64", content)
    push(layout, built, reference)
    killed = threading.Event()
    reached: list[int] = []

    def killing(done: int, _: int) -> None:
        reached.append(done)
        if done >= 2 * MB and not killed.is_set():
            killed.set()
            registry.kill()
            threading.Timer(0.3, registry.start).start()

    assert pull(reference, fetched, progress=killing).digest == built.digest
    assert killed.is_set()
    assert reached == sorted(reached)  # what had arrived was not fetched again


def test_a_full_disk_here_is_said_and_leaves_nothing_half_written(
    layout: Layout, registry: RegistryProcess, require: Require, tmp_path: Path
) -> None:
    require(can_mount(), "the right to mount")
    reference = Reference(registry.host, "full/here", "1")
    push(layout, _manifest(layout, "linux/amd64", os.urandom(3 * MB)), reference)
    folder = tmp_path / "small"
    with small_disk(folder, 2):
        fetched = Layout(folder / "layout")
        with pytest.raises(DiskFullError, match=f"no space is left in {fetched.folder}"):
            pull(reference, fetched)
        assert _half_written(fetched) == []


def test_a_pull_can_be_stopped(layout: Layout, fetched: Layout, registry: RegistryProcess) -> None:
    reference = Reference(registry.host, "stopped/pull", "1")
    push(layout, _manifest(layout, "linux/amd64", os.urandom(8 * MB)), reference)
    cancel = threading.Event()
    with pytest.raises(FailedError, match="stopped on request"):
        pull(reference, fetched, progress=lambda done, _: cancel.set() if done > MB else None, cancel=cancel)
    assert _half_written(fetched) == []


# -- registries that are not honest


def _hostile(manifest: bytes, blobs: dict[str, bytes] | None = None, *, kind: str = OCI_MANIFEST) -> object:
    def answer(asked: Asked) -> Reply:
        if "/manifests/" in asked.path:
            return 200, {"Content-Type": kind}, manifest
        blob = (blobs or {}).get(asked.path.rpartition("/")[2])
        return (200, {}, blob) if blob is not None else (404, {}, b"")

    return answer


@pytest.mark.parametrize(
    ("manifest", "kind", "message"),
    [
        (b"x" * (9 << 20), OCI_MANIFEST, "more than the 8388608 bytes"),
        (b"[" * 100_000, OCI_MANIFEST, "not the JSON"),
        (b"[]", OCI_MANIFEST, "not the JSON"),
        (b"{}", OCI_MANIFEST, "malformed"),
        (b"{}", "text/html", "not supported"),
        (b'{"mediaType": "application/vnd.oci.image.index.v1+json"}', OCI_MANIFEST, "not supported"),
        (b"{}", "application/vnd.docker.distribution.manifest.v1+prettyjws", "not supported"),
        (b'{"manifests": {}}', OCI_INDEX, "not a list"),
        (json.dumps({"manifests": [{}] * 101}).encode(), OCI_INDEX, "at most 100"),
        (
            b'{"manifests": [{"mediaType": "a/b", "digest": "sha256:../../etc", "size": 1}]}',
            OCI_INDEX,
            "digest",
        ),
        (
            b'{"config": {"mediaType": "a/b", "digest": "sha256:/etc/passwd", "size": 1}}',
            OCI_MANIFEST,
            "digest",
        ),
    ],
)
def test_a_hostile_manifest_is_refused(fetched: Layout, manifest: bytes, kind: str, message: str) -> None:
    with (
        scripted(_hostile(manifest, kind=kind)) as host,  # type: ignore[arg-type]
        pytest.raises((InvalidInputError, FailedError), match=message),
    ):
        pull(Reference(host, "a", "1"), fetched)
    assert _blobs(fetched) == set()


def test_an_index_that_lists_itself_or_indexes_is_refused(fetched: Layout) -> None:
    inner = {"mediaType": OCI_INDEX, "digest": "sha256:" + "0" * 64, "size": 5}
    with (
        scripted(_hostile(json.dumps({"manifests": [inner]}).encode(), kind=OCI_INDEX)) as host,  # type: ignore[arg-type]
        pytest.raises(InvalidInputError, match="no image"),
    ):
        pull(Reference(host, "a", "1"), fetched)


def test_content_that_is_not_what_was_announced_is_refused(
    fetched: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = b"announced", b"something"
    digest = f"sha256:{hashlib.sha256(good).hexdigest()}"
    config = {"mediaType": OCI_CONFIG, "digest": digest, "size": len(good)}
    manifest = json.dumps({"config": config, "layers": []}).encode()
    with scripted(_hostile(manifest, {digest: bad})) as host:  # type: ignore[arg-type]
        with pytest.raises(FailedError, match="came with the digest"):
            pull(Reference(host, "a", "1"), fetched)
        with pytest.raises(FailedError, match="damaged or changed"):
            pull(Reference(host, "a", digest="sha256:" + "1" * 64), fetched)
        monkeypatch.setattr(pull_module, "MAX_IMAGE_BYTES", 5)
        with pytest.raises(FailedError, match="use a smaller one"):
            pull(Reference(host, "a", "1"), fetched)
    assert _blobs(fetched) == set()
    assert _half_written(fetched) == []
