"""The bill of materials of an image: which packages it holds, as CycloneDX, attached as an OCI artifact.

The artifact names the image as its subject, so registries list it among the image's referrers; the image's
index names it too, so that it travels with the image wherever referrers are not known. Equal packages give
equal documents: no time, and a serial number from the content.
"""

import uuid
from collections.abc import Iterable, Mapping

from packaging.utils import canonicalize_name

from flops.images.descriptor import CYCLONEDX, OCI_EMPTY, OCI_MANIFEST, Descriptor
from flops.images.layout import Layout

_NAMESPACE = uuid.UUID("6f1e7f6a-3c57-4b7c-9d5e-0a5d4b1f2c11")
_UNKNOWN = "unknown/unknown"
"""What runtimes look for no image under; BuildKit marks what describes images in the same way."""


def document(name: str, version: str, packages: Mapping[str, Iterable[str]]) -> str:
    """A CycloneDX 1.6 document.

    Args:
        name: of what the image holds. version: its commit, or what else tells versions apart.
        packages: pins such as ``numpy==1.26.4``, by the part of the image that they lie in.
    """
    from cyclonedx.model import Property  # here: it takes a third of a second to import
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    bom = Bom()
    bom.metadata.component = image = Component(
        name=name, version=version, type=ComponentType.CONTAINER, bom_ref=f"image:{name}@{version}"
    )
    components = []
    for part, pins in sorted(packages.items()):
        for pin in sorted(pins):
            package, _, release = pin.partition("==")
            url = PackageURL("pypi", None, canonicalize_name(package), release)
            component = Component(
                name=package,
                version=release,
                type=ComponentType.LIBRARY,
                purl=url,
                bom_ref=f"{part}:{url}",
                properties=[Property(name="io.flops.part", value=part)],
            )
            components.append(component)
    bom.components.update(components)
    bom.register_dependency(image, components)
    listed = sorted(f"{part}:{pin}" for part, pins in packages.items() for pin in pins)
    bom.serial_number = uuid.uuid5(_NAMESPACE, "\n".join([name, version, *listed]))
    bom.metadata.timestamp = None  # type: ignore[assignment]
    return JsonV1Dot6(bom).output_as_string()


def attach(layout: Layout, bill: str, subject: Descriptor) -> Descriptor:
    """Write the artifact that gives an image its bill; returns what the image's index says of it."""
    content = bill.encode()
    layer = Descriptor(CYCLONEDX, layout.add(content), len(content))
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": CYCLONEDX,
        "config": Descriptor(OCI_EMPTY, layout.add(b"{}"), 2).to_json(),
        "layers": [layer.to_json()],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
    }
    return layout.add_json(manifest, OCI_MANIFEST, platform=_UNKNOWN, artifact_type=CYCLONEDX)
