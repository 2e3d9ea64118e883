"""Which Python is tried for a wish."""

import os
from pathlib import Path

import pytest
from packaging.version import Version

from flops.core.errors import InvalidInputError
from flops.images import Interpreter, installed_interpreters
from flops.images.interpreters import candidates, own_interpreter


def pythons(*versions: str) -> tuple[Interpreter, ...]:
    return tuple(Interpreter(Version(version), Path(version)) for version in versions)


HERE = pythons("3.11.7", "3.13.0", "3.12.1", "3.11.2", "3.10.13", "3.10.2", "3.9.18")


@pytest.mark.parametrize(
    ("wish", "tried", "fits"),
    [
        (None, ["3.11.7", "3.10.13", "3.12.1", "3.9.18"], True),
        ("==3.11.2", ["3.11.2"], True),
        (">=3.10,<3.12", ["3.11.7", "3.10.13"], True),
        ("==3.10.14.*", ["3.10.13", "3.11.7", "3.12.1", "3.13.0"], False),
        ("==3.10.3", ["3.10.2", "3.11.7", "3.12.1", "3.13.0"], False),
        ("==3.7.*", ["3.9.18", "3.10.13", "3.11.7", "3.12.1"], False),
        (">=3.14", ["3.13.0", "3.12.1", "3.11.7", "3.10.13"], False),
    ],
)
def test_nearest_interpreters_are_tried_first(wish: str | None, tried: list[str], fits: bool) -> None:
    chosen = candidates(wish, HERE, HERE[0])
    assert [str(found.version) for found in chosen.interpreters] == tried
    assert chosen.fits is fits


def test_another_major_version_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        candidates("==2.7.*", HERE, HERE[0])
    assert str(caught.value) == (
        "Python 2.7 is asked for, which FLOps cannot run - it runs Python 3.8 and newer"
    )


def test_wish_that_is_no_version_is_refused() -> None:
    with pytest.raises(InvalidInputError) as caught:
        candidates("new", HERE, HERE[0])
    assert str(caught.value) == "'new' is not a Python version - write it like 3.11 or >=3.10,<3.13"


def test_own_interpreter_is_among_those_installed_and_none_is_a_shim() -> None:
    found = installed_interpreters()
    assert own_interpreter() == found[0]
    assert all(os.access(one.path, os.X_OK) and "shims" not in one.path.parts for one in found)
    assert len({one.version for one in found}) == len(found)


def test_shims_of_another_users_pyenv_are_passed_over(tmp_path: Path) -> None:
    """As with sudo, which may keep PATH and change HOME."""
    shims = tmp_path / "pyenv" / "shims"
    shims.mkdir(parents=True)
    (tmp_path / "pyenv" / "versions").mkdir()
    shim = shims / "python3"
    asked = tmp_path / "asked"
    shim.write_text(f'#!/bin/sh\ntouch {asked}\nexec {own_interpreter().path} "$@"\n')
    shim.chmod(0o755)
    assert installed_interpreters({"PATH": f"{shims}:/usr/bin:/bin", "HOME": str(tmp_path)})
    assert not asked.exists()
