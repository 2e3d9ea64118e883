"""From requirements to a lock: real uv, a folder of wheels."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flops.core.errors import FailedError, InvalidInputError, UnavailableError
from flops.images import Lock, PipConfiguration, resolve
from flops.images.interpreters import own_interpreter
from flops.images.undeclared import broken_bounds

if TYPE_CHECKING:
    from tests.images.conftest import Index

Resolve = Callable[..., Lock]
OWN = str(own_interpreter().version)


@pytest.fixture
def lock(index: "Index", tmp_path: Path, surroundings: dict[str, str]) -> Resolve:
    def run(*packages: str, **options: Any) -> Lock:
        options.setdefault("configuration", index.configuration)
        return resolve(packages, cache=tmp_path / "locks", environment=surroundings, **options)

    return run


def test_lock_pins_everything_that_is_needed(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    index.add("base", "2.0")
    index.add("top", "1.5", requires=["base<2"])
    got = lock("top")
    assert got.packages == ("base==1.0", "top==1.5")
    assert (got.python, got.warnings) == (OWN, ())


def test_clash_says_which_pins(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    index.add("base", "2.0")
    index.add("top", "1.0")
    index.add("top", "2.0")
    index.add("top", "1.5", requires=["base>=2"])
    with pytest.raises(InvalidInputError) as caught:
        lock("top==1.5", "base==1.0")
    assert str(caught.value) == (
        f"the requirements cannot be installed together on Python {OWN}: "
        "Because top==1.5 depends on base>=2 and you require top==1.5, you require base>=2. "
        "And because you require base==1.0, your requirements are unsatisfiable - change one of these pins"
    )


def test_version_that_nobody_has_is_said(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    with pytest.raises(InvalidInputError) as caught:
        lock("base==9.9")
    assert str(caught.value) == (
        f"the requirements cannot be installed together on Python {OWN}: "
        "Because there is no version of base==9.9 and you require base==9.9, "
        "your requirements are unsatisfiable - change one of these pins"
    )


def test_same_request_gets_the_stored_lock_with_no_index_asked(index: "Index", lock: Resolve) -> None:
    first = index.add("base", "1.0")
    before = lock("base")
    first.unlink()
    assert lock("base") == before


def test_stored_lock_stays_though_the_index_grew_until_refreshed(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    lock("base")
    index.add("base", "2.0")
    assert lock("base").packages == ("base==1.0",)
    assert lock("base", refresh=True).packages == ("base==2.0",)
    assert lock("base").packages == ("base==2.0",)


def test_damaged_lock_is_resolved_anew(index: "Index", lock: Resolve, tmp_path: Path) -> None:
    index.add("base", "1.0")
    before = lock("base")
    stored = tmp_path / "locks" / f"{before.hash}.txt"
    stored.write_text(stored.read_text().replace("1.0", "6.6"))
    assert lock("base") == before
    assert Lock.parse(stored.read_text()) is not None


def test_extra_requirements_keep_the_pins(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    index.add("tool", "1.0", requires=["base"])
    lock("base")
    index.add("base", "2.0")
    assert lock("base", extra=("tool",)).packages == ("base==1.0", "tool==1.0")


def test_extra_requirement_that_needs_another_pin_says_so(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    lock("base")
    index.add("base", "2.0")
    index.add("tool", "1.0", requires=["base>=2"])
    got = lock("base", extra=("tool",))
    assert got.packages == ("base==2.0", "tool==1.0")
    assert got.warnings == ("to add tool, other versions are used of: base==1.0",)


def test_python_that_is_not_here_falls_to_the_nearest_with_a_warning(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    minor = OWN.rpartition(".")[0]
    got = lock("base", python=f"=={minor}.98.*")
    assert got.python.startswith(f"{minor}.")
    assert got.warnings == (
        f"Python {minor}.98 is asked for and not installed on this machine; {got.python} is used",
    )


def test_index_that_is_away_is_told_from_a_clash(lock: Resolve) -> None:
    away = PipConfiguration(index_url="http://me:hush@127.0.0.1:1/simple", timeout_s=1)
    with pytest.raises(UnavailableError) as caught:
        lock("base", configuration=away)
    assert str(caught.value).startswith(
        "resolving the requirements failed: a package index could not be reached"
    )
    assert "hush" not in str(caught.value)


def test_cancelled_resolution_ends(index: "Index", lock: Resolve) -> None:
    index.add("base", "1.0")
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(FailedError, match="was stopped on request"):
        lock("base", cancel=cancel)


def test_bounds_that_packages_forgot_are_kept(index: "Index", lock: Resolve) -> None:
    for version in ("25.0", "26.0"):
        index.add("pyarrow", version)
    index.add("numpy", "1.26.4")
    assert lock("pyarrow", "numpy<2").packages == ("numpy==1.26.4", "pyarrow==25.0")


def test_forgotten_bound_that_cannot_be_kept_is_told(index: "Index", lock: Resolve) -> None:
    index.add("pyarrow", "26.0")
    index.add("numpy", "1.26.4")
    got = lock("pyarrow==26.0", "numpy<2")
    assert [bound.package for bound in broken_bounds(got.packages)] == ["pyarrow"]
    assert got.warnings == (
        "pyarrow>=26 needs numpy>=2 and does not say so; with these pins it may fail when imported - "
        "pin pyarrow<26",
    )


@pytest.mark.network
def test_old_pins_are_resolved_against_the_real_index(tmp_path: Path) -> None:
    got = resolve(
        ("numpy==1.26.4", "scikit-learn==1.4.2", "datasets<4", "pillow"), cache=tmp_path, python="==3.10.14.*"
    )
    assert {"numpy==1.26.4", "scikit-learn==1.4.2"} < set(got.packages)


@pytest.mark.network
def test_real_clash_says_which_pins(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        resolve(("datasets==3.6.0", "dill==0.4.0"), cache=tmp_path)
    message = str(caught.value)
    assert "datasets==3.6.0" in message
    assert "dill==0.4.0" in message
