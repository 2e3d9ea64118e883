from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from flops.cli.top import _Wish, table


def service(name: str, **values: Any) -> dict[str, Any]:
    return {
        "node": "node-1",
        "project": "p-7k2mqd",
        "name": f"p-7k2mqd-{name}",
        "role": name.partition("-")[0],
        "learner": None,
        "cluster": None,
        "state": "running",
        "restarts": 0,
        "round": 123,
        "rounds": 1000,
        "cpu_percent": 99.94,
        "memory_bytes": 123_456_789,
        "threads": 12,
        "received_bytes": 987_654_321,
        "sent_bytes": 12,
        "received_bytes_per_s": 123_456_789.0,
        "sent_bytes_per_s": None,
    } | values


def seen(*services: dict[str, Any]) -> dict[str, Any]:
    nodes = [
        {
            "name": name,
            "ready": name == "node-1",
            "cpus": 8,
            "capacity_bytes": 25_000_000_000,
            "services": 1,
            "cpu_percent": 120.0,
            "memory_bytes": 1_000_000_000,
        }
        for name in ("node-1", "node-2")
    ]
    return {"time": 1_700_000_000.0, "away": None, "nodes": nodes, "services": list(services)}


def drawn(value: dict[str, Any], width: int, **wish: Any) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, legacy_windows=False).print(table(value, _Wish(**wish), width))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_every_figure_fits_on_its_line(width: int) -> None:
    lines = drawn(seen(service("aggregator"), service("agent-12")), width)
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if "…" in line]
    row = next(line for line in lines if "agent-12" in line)
    for word in ("p-7k2mqd", "running", "99.9%", "123 MB", "123 MB/s", "123/1000"):
        assert word in row
    assert ("988 MB" in row) == (width >= 115)
    heading = next(line for line in lines if "SERVICE" in line)
    assert "CPU▾" in heading


def test_as_many_services_as_fit_on_the_screen_are_shown() -> None:
    many = [service(f"agent-{number}") for number in range(50)]
    lines = drawn(seen(*many), 80, rows=20)
    assert len(lines) <= 20
    assert lines[-1] == "and 38 more"


def test_what_nobody_counts_is_a_dash_and_no_zero() -> None:
    unknown = dict.fromkeys(("cpu_percent", "memory_bytes", "received_bytes_per_s"))
    row = next(line for line in drawn(seen(service("agent-1", **unknown)), 80) if "agent-1" in line)
    assert row.split() == ["p-7k2mqd", "agent-1", "running", "-", "-", "-", "-", "123/1000"]


def test_an_orchestrator_that_is_away_is_told_of() -> None:
    value = seen() | {"away": "the Docker engine does not answer", "nodes": []}
    lines = drawn(value, 80)
    assert "! the Docker engine does not answer" in lines
    assert "nothing runs - start something with 'flops run REPO'" in lines


def test_a_name_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in "".join(drawn(seen(service("agent-1", cluster="\x1b[2J")), 200))
