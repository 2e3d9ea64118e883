"""The bill of materials: what it lists, and how it hangs on its image."""

import json
from pathlib import Path

from flops.images.descriptor import CYCLONEDX, OCI_MANIFEST, Descriptor
from flops.images.layout import Layout
from flops.images.sbom import attach, document

PACKAGES = {"runtime": ["numpy==2.4.6"], "dependencies": ["Scikit_Learn==1.4.2", "numpy==1.26.4"]}


def test_lists_every_package_with_the_part_that_it_lies_in() -> None:
    bill = json.loads(document("mnist", "abc", PACKAGES))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "mnist"
    assert {
        (entry["purl"], entry["properties"][0]["value"], entry["version"]) for entry in bill["components"]
    } == {
        ("pkg:pypi/numpy@2.4.6", "runtime", "2.4.6"),
        ("pkg:pypi/numpy@1.26.4", "dependencies", "1.26.4"),
        ("pkg:pypi/scikit-learn@1.4.2", "dependencies", "1.4.2"),
    }


def test_equal_packages_give_equal_documents() -> None:
    turned = {part: list(reversed(pins)) for part, pins in reversed(PACKAGES.items())}
    assert document("mnist", "abc", PACKAGES) == document("mnist", "abc", turned)
    assert document("mnist", "abc", PACKAGES) != document("mnist", "abd", PACKAGES)


def test_names_its_image_as_subject(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    image = layout.add_json({"schemaVersion": 2}, OCI_MANIFEST, platform="linux/amd64")
    bill = document("mnist", "abc", PACKAGES)
    artifact = attach(layout, bill, image)
    assert (artifact.platform, artifact.artifact_type) == ("unknown/unknown", CYCLONEDX)
    manifest = layout.read_json(artifact)
    assert manifest["artifactType"] == CYCLONEDX
    assert manifest["subject"]["digest"] == image.digest
    assert layout.read(Descriptor.from_json(manifest["layers"][0]).digest).decode() == bill
