from pathlib import Path

from flops.manager.ports import Ports


def test_a_service_keeps_its_port_and_no_other_gets_it(tmp_path: Path) -> None:
    ports = Ports(tmp_path / "ports.json")
    first = {name: ports.of(name) for name in ("p-1-aggregator", "p-1-model", "p-2-model")}
    assert len(set(first.values())) == 3
    again = Ports(tmp_path / "ports.json")
    assert {name: again.of(name) for name in first} == first


def test_ports_of_a_forgotten_project_are_free_again(tmp_path: Path) -> None:
    ports = Ports(tmp_path / "ports.json")
    kept = ports.of("p-2-model")
    ports.of("p-1-model")
    ports.release("p-1")
    assert Ports(tmp_path / "ports.json").of("p-2-model") == kept
    assert "p-1-model" not in (tmp_path / "ports.json").read_text()


def test_a_port_that_somebody_else_has_is_not_chosen(tmp_path: Path) -> None:
    free = 25_000
    assert Ports(tmp_path / "ports.json").of("p-1-model", is_free=lambda port: port == free) == free
