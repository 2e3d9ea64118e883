"""Descriptors: what an image's documents say about a blob, checked when read from outside."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flops.core.errors import InvalidInputError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CYCLONEDX = "application/vnd.cyclonedx+json"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
"""One image for one platform, or an artifact."""
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
"""A list of manifests, one for each platform."""
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
LAYERS = frozenset({OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER_GZIP})

MAX_DOCUMENT_BYTES = 8 << 20
"""Of a manifest, an index or a config; registries refuse larger ones (4 MiB for most)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_PLATFORM_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,30}")
_MAX_SIZE = 1 << 46
_MAX_ANNOTATIONS = 256
_MAX_ANNOTATION_CHARS = 65536
_IMPLIED_VARIANTS = {"arm64": "v8", "amd64": "v1"}


def check_digest(text: object) -> str:
    """The digest, if it is one (``sha256:`` and 64 hexadecimal digits).

    Raises:
        InvalidInputError: it is not.
    """
    if isinstance(text, str) and _DIGEST.fullmatch(text):
        return text
    raise InvalidInputError(f"'{str(text)[:80]}' is not a digest - write it as sha256:<64 of 0-9a-f>")


@dataclass(frozen=True)
class Descriptor:
    """Names a blob by its content.

    Raises:
        InvalidInputError: digest, size or media type is impossible.
    """

    media_type: str
    digest: str
    size: int
    platform: str | None = None
    """Such as ``linux/amd64``; None: not said, or none."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str | None = None
    """What a manifest that is no image holds."""

    def __post_init__(self) -> None:
        check_digest(self.digest)
        for kind in (self.media_type, self.artifact_type):
            if kind is not None and not (isinstance(kind, str) and _MEDIA_TYPE.fullmatch(kind)):
                raise InvalidInputError(f"'{str(kind)[:80]}', of blob {self.digest}, is not a media type")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or not 0 <= self.size <= _MAX_SIZE:
            raise InvalidInputError(f"blob {self.digest} cannot have {str(self.size)[:40]} bytes")
        if self.platform is not None:
            parts = self.platform.split("/")
            if not 2 <= len(parts) <= 3 or not all(map(_PLATFORM_PART.fullmatch, parts)):
                raise InvalidInputError(
                    f"'{self.platform[:80]}' is not a platform - write it like linux/amd64"
                )

    @classmethod
    def from_json(cls, value: object) -> "Descriptor":
        """Read one from a decoded document of unknown origin.

        Raises:
            InvalidInputError: it is not a descriptor.
        """
        if not isinstance(value, dict):
            raise InvalidInputError("a document names a blob without a descriptor")
        media_type, size = value.get("mediaType"), value.get("size")
        if not isinstance(media_type, str) or not isinstance(size, int):
            raise InvalidInputError("a descriptor lacks its media type or its size")
        return cls(
            media_type,
            check_digest(value.get("digest")),
            size,
            _platform(value.get("platform")),
            read_annotations(value.get("annotations")),
            value.get("artifactType"),
        )

    def to_json(self) -> dict[str, Any]:
        """As documents hold it; what is absent is left out."""
        result: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.platform is not None:
            system, architecture, *variant = self.platform.split("/")
            result["platform"] = {"architecture": architecture, "os": system}
            if variant:
                result["platform"]["variant"] = variant[0]
        if self.annotations:
            result["annotations"] = dict(sorted(self.annotations.items()))
        if self.artifact_type is not None:
            result["artifactType"] = self.artifact_type
        return result

    def with_annotations(self, annotations: Mapping[str, str]) -> "Descriptor":
        """The same blob with these annotations in place of its own."""
        return replace(self, annotations=dict(annotations))


def read_annotations(value: object) -> dict[str, str]:
    """Annotations of a document of unknown origin.

    Raises:
        InvalidInputError: they are not a map of texts, or far too many.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_ANNOTATIONS:
        raise InvalidInputError("a document's annotations are not a map, or too many")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str) or len(text) > _MAX_ANNOTATION_CHARS:
            raise InvalidInputError(f"annotation '{str(key)[:80]}' is not a text, or too long")
    return dict(value)


def _platform(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidInputError("a descriptor's platform is not a map")
    architecture, variant = value.get("architecture"), value.get("variant")
    parts = [value.get("os"), architecture]
    if variant and _IMPLIED_VARIANTS.get(str(architecture)) != variant:
        parts.append(variant)
    return "/".join(map(str, parts))
