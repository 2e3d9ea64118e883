"""The folder that guests import FLOps from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from flops.core.errors import UnauthorizedError
from flops.guest import guest_path

if TYPE_CHECKING:
    from pathlib import Path


def test_it_holds_the_worker_and_the_compatibility_package_only(tmp_path: Path) -> None:
    folder = guest_path(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["flops_utils", "flops_worker"]
    assert (folder / "flops_worker" / "__main__.py").exists()
    assert (folder / "flops_utils" / "ml_repo_templates.py").exists()
    assert guest_path(tmp_path / "cache") == folder


def test_damage_is_mended(tmp_path: Path) -> None:
    folder = guest_path(tmp_path)
    (folder / "flops_worker" / "channel.py").write_text("")
    (folder / "flops_utils" / "__init__.py").unlink()
    assert guest_path(tmp_path) == folder
    assert "def receive" in (folder / "flops_worker" / "channel.py").read_text()
    assert (folder / "flops_utils" / "__init__.py").exists()


def test_many_makers_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(lambda _: guest_path(tmp_path), range(64)))
    assert len(folders) == 1
    assert sorted(path.name for path in folders.pop().iterdir()) == ["flops_utils", "flops_worker"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = guest_path(tmp_path)
    folder.chmod(0o777)
    with pytest.raises(UnauthorizedError, match="is not a private folder of this user, code in it cannot be"):
        guest_path(tmp_path)


def test_a_link_to_somewhere_else_is_refused(tmp_path: Path) -> None:
    folder = guest_path(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / folder.name).symlink_to(folder)
    with pytest.raises(UnauthorizedError):
        guest_path(tmp_path / "b")
