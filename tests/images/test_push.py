"""Pushes to a real registry: only what is missing, nothing dangling, and on after every interruption."""

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.core.disk import DiskFullError
from flops.core.errors import FailedError, InvalidInputError, NotFoundError, UnavailableError
from flops.images.descriptor import (
    CYCLONEDX,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Descriptor,
)
from flops.images.layout import Layout
from flops.images.pull import pull
from flops.images.push import push
from flops.images.references import Reference
from flops.images.registry import Registry
from flops.images.registry_service import collect_command, forget_stale_uploads, registry_installed
from tests.conftest import Require
from tests.registries import (
    RegistryProcess,
    can_mount,
    free_port,
    resize_disk,
    running_registry,
    small_disk,
)

MB = 1 << 20
PLATFORMS = ("linux/amd64", "linux/arm64")


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory, require: Require) -> Iterator[RegistryProcess]:
    require(registry_installed() is not None, "docker-registry")
    with running_registry(tmp_path_factory.mktemp("registry")) as process:
        yield process


@pytest.fixture
def registry(_shared: RegistryProcess) -> RegistryProcess:
    return _shared


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def image(layout: Layout, *layers: bytes, platforms: tuple[str, ...] = PLATFORMS) -> Descriptor:
    """An index of images with these layers; their configs differ."""
    manifests = []
    described = [Descriptor(OCI_LAYER_GZIP, layout.add(layer), len(layer)) for layer in layers]
    for platform in platforms:
        system, architecture = platform.split("/")
        config = layout.add_json({"os": system, "architecture": architecture}, OCI_CONFIG)
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in described],
        }
        manifests.append(layout.add_json(document, OCI_MANIFEST, platform=platform))
    return layout.add_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [manifest.to_json() for manifest in manifests],
        },
        OCI_INDEX,
    )


def test_what_is_pushed_is_pulled_again_with_the_same_digests(
    layout: Layout, registry: RegistryProcess, tmp_path: Path
) -> None:
    pushed_image = image(layout, os.urandom(3 * MB), b"code")
    reference = Reference(registry.host, "round/trip", "1")
    pushed = push(layout, pushed_image, reference)
    assert pushed.reference == reference.with_digest(pushed_image.digest)
    assert pushed.sent_bytes > 3 * MB

    fetched = Layout(tmp_path / "other")
    found = pull(reference, fetched)
    assert (found.digest, found.media_type) == (pushed_image.digest, OCI_INDEX)
    assert {path.name for path in (layout.folder / "blobs/sha256").iterdir()} == {
        path.name for path in (fetched.folder / "blobs/sha256").iterdir()
    }


def test_the_second_push_sends_nothing_and_a_change_sends_only_itself(
    layout: Layout, registry: RegistryProcess
) -> None:
    dependencies = os.urandom(2 * MB)
    reference = Reference(registry.host, "only/changes", "1")
    first = push(layout, image(layout, dependencies, b"code"), reference)
    again = push(layout, image(layout, dependencies, b"code"), reference)
    assert again.sent_bytes == again.mounted_bytes == 0
    assert again.present_bytes == first.sent_bytes
    changed = push(layout, image(layout, dependencies, b"other code"), reference)
    assert 0 < changed.sent_bytes < 5000


def test_blobs_of_another_repository_are_mounted(layout: Layout, registry: RegistryProcess) -> None:
    base = os.urandom(2 * MB)
    push(layout, image(layout, base), Reference(registry.host, "mount/base", "1"))
    pushed = push(
        layout,
        image(layout, base, b"code"),
        Reference(registry.host, "mount/project", "1"),
        mount_from=("mount/nothing-here", "mount/base"),
    )
    assert pushed.mounted_bytes >= 2 * MB
    assert pushed.sent_bytes < 5000


def test_blobs_that_only_the_registry_has_need_not_be_in_the_layout(
    layout: Layout, registry: RegistryProcess
) -> None:
    base = os.urandom(MB)
    push(layout, image(layout, base), Reference(registry.host, "absent/base", "1"))
    built = image(layout, base, b"more")
    layout.path("sha256:" + hashlib.sha256(base).hexdigest()).unlink()
    pushed = push(layout, built, Reference(registry.host, "absent/project", "1"), mount_from=("absent/base",))
    assert pushed.mounted_bytes >= MB
    with pytest.raises(NotFoundError, match="neither in"):
        push(layout, built, Reference(registry.host, "absent/third", "1"))
    assert registry.tags("absent/third") == []


def test_a_registry_killed_half_way_and_started_again_gets_the_rest(
    layout: Layout, registry: RegistryProcess
) -> None:
    """Killed between two chunks: the upload goes on where it was."""
    content = os.urandom(8 * MB)
    reference = Reference(registry.host, "killed/between", "1")
    reached: list[int] = []

    def killing(done: int, _: int) -> None:
        reached.append(done)
        # Told twice: when the chunk was sent, and when the registry has confirmed it.
        if reached[-2:] == [4 * MB, 4 * MB] and reached.count(4 * MB) == 2:
            registry.kill()
            threading.Timer(0.5, registry.start).start()

    with Registry(registry.host, chunk_bytes=MB) as client:
        push(layout, image(layout, content), reference, registry=client, parallel=1, progress=killing)
    assert registry.tags("killed/between") == ["1"]
    after = reached[reached.index(4 * MB) :]
    assert after.count(4 * MB) >= 3  # once more: where the registry, asked, says that it is
    assert after == sorted(after)


def test_a_registry_killed_inside_a_chunk_gets_the_whole_image_in_the_end(
    layout: Layout, registry: RegistryProcess, tmp_path: Path
) -> None:
    reference = Reference(registry.host, "killed/inside", "1")
    killed = threading.Event()

    def killing(done: int, _: int) -> None:
        if done >= 5.5 * MB and not killed.is_set():
            killed.set()
            registry.kill()
            threading.Timer(0.5, registry.start).start()

    built = image(layout, os.urandom(8 * MB), b"code")
    with Registry(registry.host, chunk_bytes=2 * MB) as client:
        push(layout, built, reference, registry=client, progress=killing)
    assert killed.is_set()
    assert pull(reference, Layout(tmp_path / "other")).digest == built.digest


def test_a_registry_that_stays_away_is_named_and_a_later_push_sends_the_rest(
    layout: Layout, require: Require, tmp_path: Path
) -> None:
    require(registry_installed() is not None, "docker-registry")
    big, small = os.urandom(6 * MB), os.urandom(4 * MB)
    built = image(layout, big, small)
    with running_registry(tmp_path / "registry") as registry:
        reference = Reference(registry.host, "stays/away", "1")

        def killing(done: int, _: int) -> None:
            if done >= 7 * MB:  # the first blob has arrived, the second is on its way
                registry.kill()

        with (
            Registry(registry.host, pauses_s=(0.01, 0.02)) as client,
            pytest.raises(UnavailableError, match=r"cannot be reached.*start it, or name another"),
        ):
            push(layout, built, reference, registry=client, parallel=1, progress=killing)
        registry.start()
        assert registry.tags("stays/away") == []
        pushed = push(layout, built, reference)
        assert pushed.sent_bytes < 5 * MB
        assert pushed.present_bytes == 6 * MB
        assert registry.tags("stays/away") == ["1"]


def test_a_registry_that_is_not_there_is_an_error_that_says_what_to_do(layout: Layout) -> None:
    host = f"127.0.0.1:{free_port()}"
    with (
        Registry(host, pauses_s=(0.01,)) as client,
        pytest.raises(UnavailableError, match=f"image registry {host} cannot be reached.*FLOPS_REGISTRY"),
    ):
        push(layout, image(layout, b"x"), Reference(host, "a", "1"), registry=client)


def test_a_full_registry_says_so_tags_nothing_and_gets_the_rest_later(
    layout: Layout, require: Require, tmp_path: Path
) -> None:
    require(registry_installed() is not None, "docker-registry")
    require(can_mount(), "the right to mount")
    folder = tmp_path / "registry"
    built = image(layout, os.urandom(3 * MB), os.urandom(4 * MB), os.urandom(2 * MB))
    # The largest is sent first.
    with small_disk(folder, 6), running_registry(folder) as registry:
        reference = Reference(registry.host, "full/disk", "1")
        with pytest.raises(DiskFullError, match=f"no space is left in image registry {registry.host}"):
            push(layout, built, reference, parallel=1)
        assert registry.tags("full/disk") == []
        with (
            Registry(registry.host, pauses_s=()) as client,
            pytest.raises(DiskFullError, match="no space is left"),
        ):
            push(layout, image(layout, b"another"), Reference(registry.host, "no/room", "1"), registry=client)
        registry.stop()
        registry.start()  # a full disk does not keep it from starting
        # What broke off keeps its space until it is forgotten.
        assert forget_stale_uploads(folder) == 0
        assert forget_stale_uploads(folder, older_than_s=0) > MB
        resize_disk(folder, 16)
        pushed = push(layout, built, reference)
        assert pushed.present_bytes >= 4 * MB
        assert pushed.sent_bytes < 6 * MB
        assert registry.tags("full/disk") == ["1"]
        assert pull(reference, Layout(tmp_path / "other")).digest == built.digest


def test_a_damaged_blob_of_the_layout_is_refused_and_nothing_is_tagged(
    layout: Layout, registry: RegistryProcess
) -> None:
    content = os.urandom(MB)
    built = image(layout, content)
    path = layout.path("sha256:" + hashlib.sha256(content).hexdigest())
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FailedError, match=f"other content .* remove {path}"):
        push(layout, built, Reference(registry.host, "damaged/content", "1"))
    path.write_bytes(content[:-1])
    with pytest.raises(FailedError, match="1048575 of 1048576 bytes"):
        push(layout, built, Reference(registry.host, "damaged/size", "1"))
    assert registry.tags("damaged/content") == registry.tags("damaged/size") == []


def test_a_push_can_be_stopped(layout: Layout, registry: RegistryProcess) -> None:
    cancel = threading.Event()

    def stopping(done: int, _: int) -> None:
        if done >= MB:
            cancel.set()

    with pytest.raises(FailedError, match="stopped on request"):
        push(
            layout,
            image(layout, os.urandom(4 * MB)),
            Reference(registry.host, "stopped/push", "1"),
            progress=stopping,
            cancel=cancel,
        )
    assert registry.tags("stopped/push") == []


def test_progress_ends_with_all_bytes(layout: Layout, registry: RegistryProcess) -> None:
    said: list[tuple[int, int]] = []
    push(
        layout,
        image(layout, os.urandom(MB), b"two"),
        Reference(registry.host, "told/all", "1"),
        progress=lambda done, total: said.append((done, total)),
    )
    assert said[-1][0] == said[-1][1] > MB
    assert len({total for _, total in said}) == 1


def test_an_artifact_follows_its_image_and_is_found_by_the_tag_of_its_subject(
    layout: Layout, registry: RegistryProcess
) -> None:
    """docker-registry 2.8 knows no referrers."""
    built = image(layout, b"layer", platforms=("linux/amd64",))
    manifest = layout.references(built)[0]
    artifacts = [_artifact(layout, manifest, content) for content in (b"{}", b'{"other": 1}')]
    reference = Reference(registry.host, "with/sbom", "1")
    push(layout, built, reference, referrers=artifacts)
    again = push(layout, built, reference, referrers=artifacts)
    assert again.sent_bytes == 0
    with Registry(registry.host) as client:
        described, content = client.manifest("with/sbom", manifest.digest.replace(":", "-"))
        listed = json.loads(content)["manifests"]
        assert described.media_type == OCI_INDEX
        assert [entry["digest"] for entry in listed] == [artifact.digest for artifact in artifacts]
        assert {entry["artifactType"] for entry in listed} == {CYCLONEDX}
        assert client.manifest("with/sbom", artifacts[0].digest)[0].digest == artifacts[0].digest


def test_without_a_tag_an_image_is_found_by_its_digest_alone(
    layout: Layout, registry: RegistryProcess, tmp_path: Path
) -> None:
    built = image(layout, b"untagged")
    reference = Reference(registry.host, "un/tagged", digest=built.digest)
    push(layout, built, reference)
    assert registry.tags("un/tagged") == []
    assert pull(reference, Layout(tmp_path / "other")).digest == built.digest
    with pytest.raises(InvalidInputError, match="names another digest"):
        push(layout, image(layout, b"another"), reference)


def test_two_pushes_at_once_both_end_well(layout: Layout, registry: RegistryProcess) -> None:
    shared = os.urandom(2 * MB)
    failures: list[BaseException] = []

    def pushing(number: int) -> None:
        try:
            built = image(layout, shared, b"code %d" % number)
            push(layout, built, Reference(registry.host, "at/once", str(number)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=pushing, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert registry.tags("at/once") == ["0", "1", "2", "3"]


def test_a_deleted_image_is_gone_and_its_space_can_be_freed(
    layout: Layout, registry: RegistryProcess
) -> None:
    content = os.urandom(MB)
    built = image(layout, content)
    stored = registry.blob("sha256:" + hashlib.sha256(content).hexdigest())
    push(layout, built, Reference(registry.host, "to/delete", "1"))
    with Registry(registry.host) as client:
        client.delete_manifest("to/delete", built.digest)
        client.delete_manifest("to/delete", built.digest)
        assert client.digest_of("to/delete", "1") is None
        for manifest in layout.references(built):
            client.delete_manifest("to/delete", manifest.digest)
    assert stored.exists()
    registry.stop()
    subprocess.run(collect_command(registry.folder), check=True, capture_output=True, timeout=60)
    registry.start()
    assert not stored.exists()


def _artifact(layout: Layout, subject: Descriptor, content: bytes) -> Descriptor:
    empty = Descriptor(OCI_EMPTY, layout.add(b"{}"), 2)
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": CYCLONEDX,
        "config": empty.to_json(),
        "layers": [Descriptor(CYCLONEDX, layout.add(content), len(content)).to_json()],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
    }
    return layout.add_json(document, OCI_MANIFEST)
