"""What a data owner sees, on a narrow terminal too."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flops.cli.main import app
from flops.core.consent import Consent
from flops.core.errors import ConflictError
from flops.federation.tally import Counts
from flops.node.assignment import Assignment
from flops.node.home import NodeHome
from flops.node.journal import Journal
from tests.node.conftest import MEMBERSHIP, PROJECT, wanted


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeHome:
    monkeypatch.setenv("FLOPS_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    home = NodeHome(tmp_path)
    home.make()
    home.keep_membership(MEMBERSHIP)
    home.keep_consent(Consent(tags=("ward-7",), teams=("vision",)))
    return home


def _shown(*words: str) -> str:
    result = CliRunner().invoke(app, ["node", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_log_says_whose_code_ran_on_what_and_how_much_left(home: NodeHome) -> None:
    assert "nothing has run on this machine's data yet" in _shown("log")
    journal = Journal(home.journal_file)
    hostile = Assignment.of(wanted(owner="an\x1b[31mn"))
    journal.ended(journal.began(hostile), "the project is over", Counts(3, 3, 1000, 2_500_000))
    journal.refused(hostile, "code of 'x' is not allowed on this node (allowed: y)")
    text = _shown("log")
    for words in (
        f"{PROJECT} of ann (team vision): ended",
        f"code  https://git.example.org/lab/mnist@{'c' * 12}, packages ",
        "data  north, under mnist, ward-7",
        "did   3 rounds in 0.0 s; 2.5 MB out, 1.0 kB in",
        "the project is over",
        f"{PROJECT} of ann (team vision): refused",
        "code of 'x' is not allowed on this node (allowed: y)",
    ):
        assert words in text
    assert "\x1b" not in text


def test_the_status_of_a_stopped_node_says_so(home: NodeHome) -> None:
    text = _shown("status")
    assert "node clinic of dora at https://127.0.0.1:1: stopped" in text
    assert "allowed  data tags: ward-7; projects of: team vision" in text
    assert "not known while the node does not run" in text
    assert "running  nothing" in text


def test_what_is_allowed_is_replaced_by_kind(home: NodeHome) -> None:
    assert "data tags: a, b; projects of: team vision" in _shown("allow", "--tag", "a", "--tag", "b")
    assert home.consent() == Consent(tags=("a", "b"), teams=("vision",))
    assert "code from: https://x/*" in _shown("allow", "--everything", "--repo", "https://x/*")
    assert home.consent() == Consent(repositories=("https://x/*",))


@pytest.mark.parametrize("command", [["node", "ls"], ["ls"], ["data", "ls"]])
def test_a_node_is_not_made_a_manager_by_a_look(home: NodeHome, command: list[str]) -> None:
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, ConflictError)
    assert "this machine is node clinic of https://127.0.0.1:1, and runs no manager" in str(result.exception)
    assert "flops login https://127.0.0.1:1" in str(result.exception)
    assert not (home.folder.parent / "manager.db").exists()
