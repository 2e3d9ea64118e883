"""Images from a layout into a registry.

Promises: blobs arrive before the manifests that refer to them, manifests before their index, and the tag
last: whoever pulls meanwhile, or after a failure, finds the old image or the whole new one. What the registry
has is not sent again, so a push that failed may simply be repeated.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flops.core.errors import FailedError, InvalidInputError, NotFoundError
from flops.images.blob_upload import Told
from flops.images.descriptor import INDEXES, MANIFESTS, OCI_INDEX, Descriptor, read_annotations
from flops.images.layout import Layout
from flops.images.references import Reference
from flops.images.registry import Registry
from flops.images.transfers import Progress, Transfers

_MAX_DEPTH = 3


@dataclass(frozen=True)
class Pushed:
    """What a push did; manifests count as bytes too."""

    reference: Reference
    """The image by its digest."""
    sent_bytes: int
    mounted_bytes: int
    """Taken over from other repositories of the registry."""
    present_bytes: int
    """Were there already."""


def push(
    layout: Layout,
    descriptor: Descriptor,
    reference: Reference,
    *,
    referrers: Sequence[Descriptor] = (),
    mount_from: Sequence[str] = (),
    registry: Registry | None = None,
    parallel: int = 4,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Pushed:
    """Bring an image, or an artifact, into a registry.

    Args:
        descriptor: an index or manifest in the layout, all of whose blobs are there.
        reference: where to; without a tag it is found by its digest alone.
        referrers: artifacts about it (manifests with a ``subject``), which follow it.
        mount_from: repositories of the same registry that may have some of its blobs.
        registry: None: the one that the reference names, with the user's credentials.
        cancel: set it from another thread to end the call.
    Raises:
        NotFoundError: a blob is not in the layout.
        InvalidInputError: the image is malformed, or has another digest than the reference.
        UnauthorizedError: we may not.
        UnavailableError: the registry is away; it has no space (DiskFullError). What arrived stays.
        FailedError: the registry refuses the image, a blob is damaged, or ``cancel`` was set.
    """
    if registry is None:
        with Registry.of_user(reference.host) as own:
            return _Push(layout, reference, own, mount_from).run(
                descriptor, referrers, parallel, progress, cancel
            )
    return _Push(layout, reference, registry, mount_from).run(
        descriptor, referrers, parallel, progress, cancel
    )


class _Push:
    def __init__(
        self, layout: Layout, reference: Reference, registry: Registry, mount_from: Sequence[str]
    ) -> None:
        self._layout = layout
        self._reference = reference
        self._repository = reference.repository
        self._registry = registry
        self._mount_from = [name for name in dict.fromkeys(mount_from) if name != reference.repository]
        self._lock = threading.Lock()
        self._bytes = {"sent": 0, "mounted": 0, "present": 0}

    def run(
        self,
        descriptor: Descriptor,
        referrers: Sequence[Descriptor],
        parallel: int,
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> Pushed:
        if self._reference.digest not in (None, descriptor.digest):
            raise InvalidInputError(
                f"{descriptor.digest} cannot be pushed as {self._reference}, which names another digest - "
                "leave the digest out"
            )
        manifests: dict[str, Descriptor] = {}
        blobs: list[Descriptor] = []
        for root in (descriptor, *referrers):
            self._gather(root, manifests, blobs, _MAX_DEPTH)
        transfers = Transfers(f"the push of {self._reference}", blobs, progress, cancel)
        transfers.run(self._send_blob, parallel)
        about = {referrer.digest for referrer in referrers}
        for manifest in manifests.values():
            transfers.check()
            if manifest.digest != descriptor.digest and manifest.digest not in about:
                self._send_manifest(manifest, manifest.digest)
        self._send_manifest(descriptor, self._reference.tag or descriptor.digest)
        for referrer in referrers:
            transfers.check()
            self._send_manifest(referrer, referrer.digest)
        return Pushed(
            self._reference.with_digest(descriptor.digest),
            self._bytes["sent"],
            self._bytes["mounted"],
            self._bytes["present"],
        )

    def _gather(
        self, root: Descriptor, manifests: dict[str, Descriptor], blobs: list[Descriptor], depth: int
    ) -> None:
        """List blobs, and manifests after what they refer to; an artifact's subject is no part of it."""
        if root.digest in manifests:
            return
        subject = self._subject(self._layout.read_json(root))
        parts = [part for part in self._layout.references(root) if part != subject]
        if root.media_type in MANIFESTS:
            blobs += parts
        elif root.media_type in INDEXES and depth > 0:
            for part in parts:
                self._gather(part, manifests, blobs, depth - 1)
        else:
            raise InvalidInputError(
                f"{root.digest} is a {root.media_type}, which cannot be pushed as an image"
            )
        manifests[root.digest] = root

    def _send_blob(self, blob: Descriptor, told: Told) -> None:
        if self._registry.has_blob(self._repository, blob.digest):
            self._count("present", blob)
            return
        source = self._registry.source_of(blob.digest, self._mount_from)
        file = self._layout.path(blob.digest)
        if source is None:
            self._check_there(blob)
        how = self._registry.send_blob(self._repository, blob, file, mount_from=source, told=told)
        self._count(how, blob)

    def _check_there(self, blob: Descriptor) -> None:
        if not self._layout.has(blob.digest):
            raise NotFoundError(
                f"blob {blob.digest} of image {self._reference} is neither in {self._layout.folder} nor in "
                "its registry - pull or build it again"
            )
        size = self._layout.path(blob.digest).stat().st_size
        if size != blob.size:
            raise FailedError(
                f"blob {blob.digest} in {self._layout.folder} has {size} of {blob.size} bytes - "
                "remove it, pull or build it again"
            )

    def _send_manifest(self, manifest: Descriptor, target: str) -> None:
        document = self._layout.read_json(manifest)
        subject = self._subject(document)
        if self._registry.digest_of(self._repository, target) == manifest.digest:
            self._count("present", manifest)
            listed = subject is None or self._registry.lists_referrers(self._repository, subject.digest)
        else:
            content = self._layout.read(manifest.digest)
            listed = self._registry.send_manifest(self._repository, target, manifest, content)
            self._count("sent", manifest)
        if subject is not None and not listed:
            self._list_referrer(subject, manifest, document)

    def _subject(self, document: Mapping[str, Any]) -> Descriptor | None:
        return Descriptor.from_json(document["subject"]) if "subject" in document else None

    def _list_referrer(self, subject: Descriptor, manifest: Descriptor, document: Mapping[str, Any]) -> None:
        """Do what a registry without referrers would do: keep their list under a tag.

        Two pushes at the very same time may lose one entry, which its next push brings back.

        Source:
            OCI distribution specification 1.1, "Referrers Tag Schema".
        """
        tag = subject.digest.replace(":", "-")
        entry = Descriptor(
            manifest.media_type,
            manifest.digest,
            manifest.size,
            annotations=read_annotations(document.get("annotations")),
            artifact_type=document.get("artifactType")
            or Descriptor.from_json(document.get("config")).media_type,
        )
        entries: list[Any] = []
        try:
            _, content = self._registry.manifest(self._repository, tag)
            entries = list(json.loads(content).get("manifests") or ())
        except NotFoundError:
            pass
        if any(isinstance(other, dict) and other.get("digest") == entry.digest for other in entries):
            return
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*entries, entry.to_json()]}
        described = self._layout.add_json(index, OCI_INDEX)
        content = self._layout.read(described.digest)
        self._registry.send_manifest(self._repository, tag, described, content)
        self._count("sent", described)

    def _count(self, how: str, blob: Descriptor) -> None:
        with self._lock:
            self._bytes[how] += blob.size
