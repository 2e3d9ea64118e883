"""The image that others are built on: its layers in a layout, and the Python in it."""

import re
from dataclasses import dataclass

from flops.core.errors import FailedError, InvalidInputError
from flops.images.descriptor import CONFIGS, INDEXES, LAYERS, MANIFESTS, Descriptor
from flops.images.layout import Layout

PYTHON = "io.flops.python"
"""Annotation of a base of ours: the path of its interpreter."""
PYTHON_VERSION = "io.flops.python.version"
"""Annotation of a base of ours: such as 3.11."""

_VERSION = re.compile(r"(3\.\d{1,2})(\.\d+)?\w*")
_DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_PATH = re.compile(r"/[A-Za-z0-9._/+-]{1,200}")
_MAX_LAYERS = 120
_MAX_VARIABLES = 200


@dataclass(frozen=True)
class BaseImage:
    """One platform's base, all of whose blobs are in a layout."""

    platform: str
    manifest: Descriptor
    layers: tuple[Descriptor, ...]
    diff_ids: tuple[str, ...]
    """Digests of the layers' uncompressed forms, in the same order."""
    environment: tuple[str, ...]
    """Such as ``PATH=/usr/bin``."""
    python: str
    """Path of its interpreter."""
    python_version: str
    """Such as ``3.11``."""
    source: str
    """Where it came from, for people."""


def manifest_for(layout: Layout, descriptor: Descriptor, platform: str) -> Descriptor:
    """The manifest of one platform, in an index or by itself.

    Raises:
        InvalidInputError: the image is not made for that platform, or its documents are malformed.
        NotFoundError, FailedError: its documents are not in the layout, or damaged.
    """
    if descriptor.media_type in MANIFESTS:
        config = _config(layout, descriptor)
        made_for = f"{config.get('os')}/{config.get('architecture')}"
        if made_for != platform:
            raise InvalidInputError(
                f"image {descriptor.digest} is made for {made_for}, {platform} is asked for - "
                "name an image that has both"
            )
        return descriptor
    if descriptor.media_type not in INDEXES:
        raise InvalidInputError(f"{descriptor.digest} is a {descriptor.media_type} and no image")
    listed = [
        entry
        for entry in layout.references(descriptor)
        if entry.media_type in MANIFESTS and entry.platform is not None
    ]
    for entry in listed:
        if entry.platform == platform:
            return entry
    there = sorted({str(entry.platform) for entry in listed} - {"unknown/unknown"})
    raise InvalidInputError(
        f"image {descriptor.digest} is made for {', '.join(there) or 'no platform'}, "
        f"{platform} is asked for - name an image that has it"
    )


def read_base(layout: Layout, descriptor: Descriptor, platform: str, source: str) -> BaseImage:
    """The base for one platform, from the image's own documents.

    The interpreter is what annotations of the manifest say (`PYTHON`, `PYTHON_VERSION`), else what the
    variable ``PYTHON_VERSION`` of the public ``python`` images does.

    Raises:
        InvalidInputError: not made for that platform, malformed, or it does not say which Python it has.
        NotFoundError, FailedError: a document or layer is not in the layout, or damaged.
    """
    manifest = manifest_for(layout, descriptor, platform)
    document, config = layout.read_json(manifest), _config(layout, manifest)
    layers = tuple(Descriptor.from_json(layer) for layer in _list(document, "layers", source))
    diff_ids = tuple(map(str, _list(config.get("rootfs"), "diff_ids", source)))
    if (
        len(layers) != len(diff_ids)
        or len(layers) > _MAX_LAYERS
        or not all(map(_DIFF_ID.fullmatch, diff_ids))
    ):
        raise InvalidInputError(f"base image {source} is malformed: its layers and its config disagree")
    for layer in layers:
        if layer.media_type not in LAYERS:
            raise InvalidInputError(f"base image {source} has a layer of type {layer.media_type}")
        if not layout.has(layer.digest):
            raise FailedError(
                f"layer {layer.digest} of base image {source} is missing - pull or make it again"
            )
    settings = config.get("config")
    variables = settings.get("Env") if isinstance(settings, dict) else None
    environment = tuple(str(value) for value in variables or ())[:_MAX_VARIABLES]
    python, version = _python(document.get("annotations"), environment, source)
    return BaseImage(platform, manifest, layers, diff_ids, environment, python, version, source)


def _python(annotations: object, environment: tuple[str, ...], source: str) -> tuple[str, str]:
    said = annotations if isinstance(annotations, dict) else {}
    variables = dict(value.partition("=")[::2] for value in environment)
    version = _VERSION.fullmatch(str(said.get(PYTHON_VERSION) or variables.get("PYTHON_VERSION", "")))
    if version is None:
        raise InvalidInputError(
            f"base image {source} does not say which Python it has - use a 'python' image, or make one with "
            "'flops images base'"
        )
    path = str(said.get(PYTHON) or f"/usr/local/bin/python{version[1]}")
    if not _PATH.fullmatch(path) or ".." in path.split("/"):
        raise InvalidInputError(f"base image {source} has its Python at '{path[:80]}', which is no path")
    return path, version[1]


def _config(layout: Layout, manifest: Descriptor) -> dict[str, object]:
    config = Descriptor.from_json(layout.read_json(manifest).get("config"))
    if config.media_type not in CONFIGS:
        raise InvalidInputError(f"{manifest.digest} is no image: its config is a {config.media_type}")
    return layout.read_json(config)


def _list(value: object, key: str, source: str) -> list[object]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise InvalidInputError(f"base image {source} is malformed: it has no {key}")
    return found
