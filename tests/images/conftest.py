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
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        records = [f"{path},{_digest(text)},{len(text)}" for path, text in content.items()]
        content[f"{info}/RECORD"] = "\n".join([*records, f"{info}/RECORD,,"]) + "\n"
        wheel = self.folder / f"{name}-{version}-py3-none-any.whl"
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


@pytest.fixture(scope="session")
def uv_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share: what uv learns of this machine's interpreters takes it a second."""
    return tmp_path_factory.mktemp("uv-cache")


@pytest.fixture
def surroundings(uv_cache: Path) -> dict[str, str]:
    """This process's environment without pip's and uv's settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "UV_"))}
    return {**kept, "UV_CACHE_DIR": str(uv_cache), "UV_HTTP_RETRIES": "0"}
