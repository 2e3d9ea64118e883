"""Sites belong to the data owner who was there first, on both engines."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flops.core.clock import ManualClock
from flops.core.errors import ForbiddenError
from flops.manager.ownership import SiteOwners
from flops.persistence import open_database


@pytest.fixture
def owners(database: Path | str) -> Iterator[SiteOwners]:
    engine = open_database(database)
    yield SiteOwners(engine, ManualClock())
    engine.dispose()


def _empty() -> list[str]:
    return []


def _never() -> list[str]:
    raise AssertionError("what is known need not be looked for")


def test_who_comes_first_has_the_site(owners: SiteOwners) -> None:
    owners.claim(["ward-1", "ward-2"], "dora", _empty)
    owners.claim(["ward-1"], "dora", _never)
    assert owners.of("dora") == {"ward-1", "ward-2"}
    assert owners.of("carl") == frozenset()


@pytest.mark.parametrize(
    ("wanted", "holding"),
    [(["ward-3", "ward-1"], _empty), (["ward-3", "ward-4"], lambda: ["ward-4"])],
    ids=["of somebody else", "with data of nobody in particular"],
)
def test_a_site_that_is_not_theirs_is_refused_and_none_is_claimed(
    owners: SiteOwners, wanted: list[str], holding: Callable[[], list[str]]
) -> None:
    owners.claim(["ward-1"], "dora", _empty)
    with pytest.raises(ForbiddenError, match=r"site 'ward-[14]' is not yours"):
        owners.claim(wanted, "carl", holding)
    assert owners.of("carl") == frozenset()
