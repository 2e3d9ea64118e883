"""Manifests, configs and indexes: an image as layers, written and read again.

Equal layers, settings and annotations give equal digests; times are the epoch, or what the annotation
``org.opencontainers.image.created`` says.

Source:
    OCI image specification 1.1. Everything is a plain OCI document: docker 20.10, containerd, podman, skopeo
    and Debian's docker-registry take them.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flops.core.errors import InvalidInputError
from flops.images.base_image import PYTHON_VERSION, BaseImage, manifest_for
from flops.images.descriptor import (
    LAYERS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    check_digest,
    read_annotations,
)
from flops.images.layer import Layer
from flops.images.layout import Layout

TITLE = "org.opencontainers.image.title"
REVISION = "org.opencontainers.image.revision"
CREATED = "org.opencontainers.image.created"
BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
LOCK = "io.flops.lock"
"""Annotation of an image: hash of the lock that its dependencies come from."""

_EPOCH = "1970-01-01T00:00:00Z"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_USER = "10001:10001"
_MAX_LAYERS = 120  # docker's overlay driver takes 128


@dataclass(frozen=True)
class Image:
    """One platform's image."""

    platform: str
    layers: tuple[Layer, ...]
    environment: tuple[str, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)

    def on_top(self, layers: Iterable[Layer], annotations: Mapping[str, str]) -> "Image":
        """With more layers and annotations."""
        return replace(self, layers=(*self.layers, *layers), annotations={**self.annotations, **annotations})

    def without(self, kinds: Collection[str]) -> "Image":
        """Less all layers of some kinds."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.what not in kinds))


def on_base(base: BaseImage, environment: Mapping[str, str]) -> Image:
    """A base as an image; ``environment`` is set over its own."""
    layers = tuple(map(Layer.of, base.layers, base.diff_ids))
    variables = dict(value.partition("=")[::2] for value in base.environment) | dict(environment)
    annotations = {
        BASE_NAME: base.source,
        BASE_DIGEST: base.manifest.digest,
        PYTHON_VERSION: base.python_version,
    }
    return Image(
        base.platform, layers, tuple(f"{name}={value}" for name, value in variables.items()), annotations
    )


def store(layout: Layout, image: Image) -> Descriptor:
    """Write config and manifest; gives the manifest.

    Raises:
        InvalidInputError: too many layers, or the time it was created at is none.
    """
    if len(image.layers) > _MAX_LAYERS:
        raise InvalidInputError(
            f"an image cannot have {len(image.layers)} layers - use a base with fewer than "
            f"{_MAX_LAYERS - len(image.layers)} of them"
        )
    created = image.annotations.get(CREATED, _EPOCH)
    if not _TIME.fullmatch(created):
        raise InvalidInputError(f"'{created[:40]}' is not a time - write it like {_EPOCH}")
    system, architecture = image.platform.split("/")[:2]
    config = {
        "created": created,
        "architecture": architecture,
        "os": system,
        "config": {
            "User": _USER,
            "Env": list(image.environment),
            "WorkingDir": "/",
            "Labels": dict(image.annotations),
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in image.layers]},
        "history": [{"created": created, "created_by": layer.what} for layer in image.layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": layout.add_json(config, OCI_CONFIG).to_json(),
        "layers": [layer.descriptor.to_json() for layer in image.layers],
        "annotations": dict(image.annotations),
    }
    return layout.add_json(manifest, OCI_MANIFEST, platform=image.platform)


def load(layout: Layout, descriptor: Descriptor, platform: str) -> Image:
    """Read an image again, from its manifest or an index.

    Raises:
        InvalidInputError: not made for the platform, or malformed.
        NotFoundError, FailedError: a document is not in the layout, or damaged.
    """
    manifest = layout.read_json(manifest_for(layout, descriptor, platform))
    config = layout.read_json(Descriptor.from_json(manifest.get("config")))
    try:
        listed = [Descriptor.from_json(layer) for layer in manifest["layers"]]
        diff_ids = [check_digest(diff_id) for diff_id in config["rootfs"]["diff_ids"]]
        environment = tuple(str(value) for value in config["config"].get("Env") or ())
        if not {layer.media_type for layer in listed} <= LAYERS:
            raise ValueError
        layers = tuple(Layer.of(layer, diff_id) for layer, diff_id in zip(listed, diff_ids, strict=True))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidInputError(f"image {descriptor.digest} is malformed - build or pull it again") from error
    return Image(platform, layers, environment, read_annotations(manifest.get("annotations")))


def store_index(
    layout: Layout, manifests: Sequence[Descriptor], annotations: Mapping[str, str]
) -> Descriptor:
    """Write the list of an image's platforms, and of what describes them."""
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [manifest.to_json() for manifest in manifests],
        "annotations": dict(annotations),
    }
    return layout.add_json(document, OCI_INDEX)
