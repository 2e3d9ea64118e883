"""Charts and topologies: well-formed, bounded, and telling the same without eyes."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.web.curves import Series, chart, nice_ticks
from flops.web.topology import counts, topology
from flops.web.words import ago, duration, number, size
from tests.web.fake_api import HOSTILE

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(FINITE, FINITE)
def test_ticks_enclose_the_values_and_are_few(one: float, other: float) -> None:
    least, most = sorted((one, other))
    ticks = nice_ticks(least, most)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    slack = 1e-6 * max(1.0, abs(least), abs(most))
    assert ticks[0] <= least + slack
    assert ticks[-1] >= most - slack


@given(st.lists(st.floats(), max_size=300))
def test_a_chart_is_well_formed_whatever_the_values(values: list[float]) -> None:
    drawn = chart("loss", [Series("loss", list(enumerate(values, start=1)))], show=number, best=1)
    if not any(abs(value) < 1e100 for value in values):
        assert drawn == ""
        return
    ElementTree.fromstring(drawn)
    assert "nan" not in drawn.lower()
    assert "inf" not in drawn.lower()


def test_a_chart_tells_its_first_and_last_value_in_words() -> None:
    drawn = ElementTree.fromstring(chart("loss", [Series("loss", [(1, 0.9), (2, 0.4)])], show=number))
    assert drawn.findtext("desc") == "loss: 0.9000 in round 1, 0.4000 in round 2"
    assert drawn.get("role") == "img"


def test_a_chart_of_very_many_rounds_stays_small() -> None:
    points = [(index, math.sin(index)) for index in range(100_000)]
    assert len(chart("loss", [Series("loss", points)], show=number)) < 100_000


def test_names_of_lines_are_only_text() -> None:
    assert "<script" not in chart(HOSTILE, [Series(HOSTILE, [(1, 1), (2, 2)])], show=lambda _: HOSTILE)


def learners(count: int, clusters: int = 0) -> list[dict[str, object]]:
    states = ("connected", "done", "waiting", "left", "ejected", "of-the-future")
    return [
        {
            "id": f"{HOSTILE}{index}",
            "site": HOSTILE,
            "state": states[index % len(states)],
            "cluster": f"c{index % clusters}" if clusters else None,
        }
        for index in range(count)
    ]


@pytest.mark.parametrize(("count", "clusters"), [(0, 0), (1, 0), (5, 0), (40, 3), (41, 3), (10_000, 20)])
def test_a_topology_is_well_formed_and_bounded(count: int, clusters: int) -> None:
    inner = [{"id": f"c{index}", "state": "connected"} for index in range(clusters)]
    drawn = topology(learners(count, clusters), inner, {}, total=(10**9, 10**8), state="training")
    tree = ElementTree.fromstring(drawn.replace("\x1b", ""))
    assert "<script" not in drawn
    assert len(drawn) < 3_000_000
    told = tree.findtext("desc") or ""
    assert f"{count} learners" in told
    assert "1 GB sent down" in told


def test_clusters_inside_clusters_are_drawn_inside() -> None:
    clusters = [{"id": name, "state": "connected"} for name in ("europe", "europe/north", "europe/south")]
    some = [{"id": "a", "site": "s", "state": "connected", "cluster": "europe/north"}]
    drawn = topology(some, clusters, {"europe": (1000, 10)}, total=(1, 1), state="training")
    assert drawn.count('class="aggregator"') == 4
    assert "north" in drawn


def test_each_state_has_a_shape_of_its_own() -> None:
    assert dict(counts(learners(6))) == {"connected": 1, "done": 1, "waiting": 2, "left": 1, "ejected": 1}


def test_values_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0.0853, 1.44, 75, 200, 7500, 200_000)] == [
        "85 ms", "1.4 s", "75 s", "3 min 20 s", "2 h 05 min", "2 d 7 h",
    ]  # fmt: skip
    assert [size(b) for b in (0, 420, 2_400_000, 1e12)] == ["0 B", "420 B", "2.4 MB", "1 TB"]
    assert [ago(0, now) for now in (1, 40, 100, 8000, 200_000)] == [
        "just now", "40 s ago", "1 min ago", "2 h ago", "2 d ago",
    ]  # fmt: skip
