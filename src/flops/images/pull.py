"""Images from a registry into a layout.

Promises: an image's blobs arrive before the documents that refer to them, each whole and checked against its
digest or not at all; what the layout has is not fetched again; a pull that fails leaves at most whole blobs
behind, which the next one uses and `Layout.collect` removes.
"""

import json
import threading
from collections.abc import Sequence
from typing import Any

from flops.core.errors import FailedError, InvalidInputError
from flops.images.blob_upload import Told
from flops.images.descriptor import CONFIGS, INDEXES, MANIFESTS, MAX_DOCUMENT_BYTES, Descriptor
from flops.images.layout import Layout
from flops.images.references import Reference
from flops.images.registry import Registry
from flops.images.transfers import Progress, Transfers

MAX_IMAGE_BYTES = 64 << 30
"""Of all that one pull brings, compressed."""

_MAX_MANIFESTS = 100
_MAX_LAYERS = 200
_ATTEMPTS = 3


def pull(
    reference: Reference,
    layout: Layout,
    platforms: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    parallel: int = 4,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Descriptor:
    """Bring an image into a layout; it gets no name there.

    Args:
        platforms: such as ``linux/arm64``; of an image for several only these are fetched. None given: all.
        registry: None: the one that the reference names, with the user's credentials.
        cancel: set it from another thread to end the call.
    Returns:
        the image as the registry describes it: an index, even when only some of its platforms were fetched,
        or a manifest. (`manifest_for` finds the one of a platform.)
    Raises:
        InvalidInputError: the image is not made for one of the platforms, or is malformed.
        NotFoundError: there is no such image.
        UnauthorizedError: we may not have it.
        UnavailableError: the registry is away; no space is left (DiskFullError).
        FailedError: the image is damaged or far too large, or ``cancel`` was set.
    """
    if registry is None:
        with Registry.of_user(reference.host) as own:
            return _Pull(reference, layout, own, parallel, progress, cancel).run(platforms)
    return _Pull(reference, layout, registry, parallel, progress, cancel).run(platforms)


class _Pull:
    def __init__(
        self,
        reference: Reference,
        layout: Layout,
        registry: Registry,
        parallel: int,
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._reference = reference
        self._layout = layout
        self._registry = registry
        self._parallel = parallel
        self._progress = progress
        self._cancel = cancel

    def run(self, platforms: Sequence[str]) -> Descriptor:
        root, content = self._registry.manifest(self._reference.repository, self._reference.target)
        documents = [content]
        if root.media_type in INDEXES:
            manifests = []
            for entry in self._chosen(content, platforms):
                manifest = self._manifest(entry)
                manifests.append(manifest)
                documents.insert(0, manifest)
        else:
            manifests = [content]
            self._check_platform(content, platforms)
        blobs = [blob for manifest in manifests for blob in self._blobs(manifest)]
        total = sum(blob.size for blob in {blob.digest: blob for blob in blobs}.values())
        if total > MAX_IMAGE_BYTES:
            raise FailedError(
                f"image {self._reference} has {total} bytes, {MAX_IMAGE_BYTES} are allowed - "
                "use a smaller one"
            )
        transfers = Transfers(f"the pull of {self._reference}", blobs, self._progress, self._cancel)
        transfers.run(self._fetch, self._parallel)
        for document in documents:
            self._layout.add(document)
        return root

    def _chosen(self, content: bytes, platforms: Sequence[str]) -> list[Descriptor]:
        """The manifests of an index that are wanted."""
        entries = self._listed(content, "manifests", _MAX_MANIFESTS)
        if any(entry.media_type not in MANIFESTS for entry in entries):
            raise InvalidInputError(
                f"image {self._reference} lists something that is no image - "
                "name one image in it by its digest"
            )
        if not platforms:
            return entries
        by_platform: dict[str | None, Descriptor] = {}
        for entry in entries:
            by_platform.setdefault(entry.platform, entry)
        there = sorted({str(entry.platform) for entry in entries if entry.platform} - {"unknown/unknown"})
        for platform in platforms:
            if platform not in by_platform:
                raise self._wrong_platform(platform, there)
        return [by_platform[platform] for platform in dict.fromkeys(platforms)]

    def _check_platform(self, content: bytes, platforms: Sequence[str]) -> None:
        """See whether an image for one platform is for the wanted one."""
        if not platforms:
            return
        config = self._descriptor(self._object(content).get("config"))
        there = []
        if config.media_type in CONFIGS:
            if config.size > MAX_DOCUMENT_BYTES:
                raise FailedError(
                    f"the config of image {self._reference} has {config.size} bytes, far too many"
                )
            if not self._layout.has(config.digest):
                self._fetch(config, lambda _: None)
            document = self._layout.read_json(config)
            there = ["/".join(str(document.get(key))[:30] for key in ("os", "architecture"))]
            if document.get("variant") and there[0] not in platforms:
                there = [f"{there[0]}/{str(document['variant'])[:30]}"]
        for platform in platforms:
            if platform not in there:
                raise self._wrong_platform(platform, there)

    def _wrong_platform(self, platform: str, there: Sequence[str]) -> InvalidInputError:
        only = f"only {', '.join(there)}" if there else "and names no platform"
        return InvalidInputError(
            f"image {self._reference} has no {platform}, {only} - name an image that has it"
        )

    def _manifest(self, entry: Descriptor) -> bytes:
        if self._layout.has(entry.digest):
            content = self._layout.read(entry.digest)
        else:
            found, content = self._registry.manifest(self._reference.repository, entry.digest)
            if (found.media_type, found.size) != (entry.media_type, entry.size):
                raise FailedError(
                    f"image {self._reference} lists {entry.digest} with another type or size than it has - "
                    "push it again"
                )
        return content

    def _blobs(self, manifest: bytes) -> list[Descriptor]:
        config = self._descriptor(self._object(manifest).get("config"))
        return [config, *self._listed(manifest, "layers", _MAX_LAYERS)]

    def _fetch(self, blob: Descriptor, told: Told) -> None:
        """Bring a blob, again when it comes damaged."""
        if self._layout.has(blob.digest):
            return
        for attempt in range(_ATTEMPTS):
            with self._layout.writer() as writer:
                self._registry.fetch_blob(self._reference.repository, blob, writer.write, told)
                try:
                    writer.commit(blob.digest)
                    return
                except FailedError as error:
                    if attempt == _ATTEMPTS - 1:
                        raise FailedError(
                            f"image {self._reference} cannot be pulled: {error} - "
                            f"push it again, or delete it from image registry {self._registry.host}"
                        ) from error

    def _listed(self, content: bytes, key: str, most: int) -> list[Descriptor]:
        values = self._object(content).get(key)
        if not isinstance(values, list) or len(values) > most:
            raise InvalidInputError(
                f"image {self._reference} is malformed: its {key} are not a list of at most {most} - "
                "push it again"
            )
        return [self._descriptor(value) for value in values]

    def _descriptor(self, value: object) -> Descriptor:
        try:
            return Descriptor.from_json(value)
        except InvalidInputError as error:
            raise InvalidInputError(
                f"image {self._reference} is malformed: {error} - push it again"
            ) from error

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"image {self._reference} is malformed - push it again") from error
        if not isinstance(document, dict):
            raise InvalidInputError(f"image {self._reference} is malformed - push it again")
        return document
