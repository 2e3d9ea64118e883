"""FLOps' own part of images holds all that its programs import, as far as imports tell."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from flops.images import runtime

PROGRAMS = {
    "flops.federation.aggregator": runtime.DISTRIBUTIONS,
    "flops.agent.__main__": runtime.DISTRIBUTIONS,
    "flops.data.server": runtime.DISTRIBUTIONS,
    "flops.serving.__main__": runtime.DISTRIBUTIONS + runtime.SERVING,
}


def lay_down(distributions: tuple[str, ...], folder: Path) -> None:
    """Links to what the distributions have put into the running installation."""
    folder.mkdir()
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_of_images_import_nothing_that_is_not_in_them(program: str, tmp_path: Path) -> None:
    for path, content in runtime.programs("3.11").items():
        file = tmp_path / "programs" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (site,) = (tmp_path / "programs").rglob("site-packages")
    lay_down(PROGRAMS[program], tmp_path / "packages")
    code = f"import sys; sys.path += sys.argv[1:]; import {program}"

    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(site), str(tmp_path / "packages")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
