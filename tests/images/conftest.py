"""A package index made by hand: a folder of tiny wheels, so that no test here needs a network."""

import base64
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from flops.images import PipConfiguration
from flops.images.base_image import PYTHON, PYTHON_VERSION, BaseImage, read_base
from flops.images.descriptor import OCI_CONFIG, OCI_MANIFEST
from flops.images.layer import Entry, write_layer
from flops.images.layout import Layout

MakeWheel = Callable[..., Path]


@dataclass(frozen=True)
class Index:
    """A folder of wheels, and the configuration under which uv sees nothing else."""

    folder: Path

    @property
    def configuration(self) -> PipConfiguration:
        return PipConfiguration(find_links=(str(self.folder),), no_index=True)

    def add(
        self,
        name: str,
        version: str,
        *,
        requires: Sequence[str] = (),
        python: str | None = None,
        files: Mapping[str, str] | None = None,
        tag: str = "py3-none-any",
    ) -> Path:
        """Make a wheel with one module of the package's name, which knows its version."""
        info = f"{name}-{version}.dist-info"
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        metadata += [f"Requires-Dist: {other}" for other in requires]
        if python is not None:
            metadata.append(f"Requires-Python: {python}")
        content = {
            f"{name}.py": f"VERSION = {version!r}\n",
            **(files or {}),
            f"{info}/METADATA": "\n".join(metadata) + "\n",
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        }
        records = [f"{path},{_digest(text)},{len(text)}" for path, text in content.items()]
        content[f"{info}/RECORD"] = "\n".join([*records, f"{info}/RECORD,,"]) + "\n"
        wheel = self.folder / f"{name}-{version}-{tag}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in content.items():
                archive.writestr(path, text)
        return wheel


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "wheels"
    folder.mkdir()
    return Index(folder)


def tiny_base(layout: Layout, platform: str, python: str = "3.11") -> BaseImage:
    """A base with one file, for what need not run."""
    layer = write_layer(layout, "base", [Entry.file("/etc/platform", platform.encode())])
    system, architecture = platform.split("/")
    config = {
        "os": system,
        "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        "config": {"Env": ["PATH=/usr/bin:/bin", "LANG=C"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": layout.add_json(config, OCI_CONFIG).to_json(),
        "layers": [layer.descriptor.to_json()],
        "annotations": {PYTHON: f"/usr/bin/python{python}", PYTHON_VERSION: python},
    }
    return read_base(layout, layout.add_json(manifest, OCI_MANIFEST), platform, "tiny")


@pytest.fixture(scope="session")
def uv_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share: what uv learns of this machine's interpreters takes it a second."""
    return tmp_path_factory.mktemp("uv-cache")


@pytest.fixture
def surroundings(uv_cache: Path) -> dict[str, str]:
    """This process's environment without pip's and uv's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    return {**kept, "UV_CACHE_DIR": str(uv_cache), "UV_HTTP_RETRIES": "0"}
