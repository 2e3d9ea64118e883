"""What a learner did and sent, counted by its agent."""

from pathlib import Path

from flops.federation.tally import Counts, Tally, read_tally


def test_the_next_agent_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "tally"
    first = Tally(path)
    first.trained()
    first.sent(1000)
    first.received(10)
    second = Tally(path)  # the first one was killed: nothing of it was closed or flushed
    second.trained()
    second.evaluated()
    second.sent(5)
    assert read_tally(path) == Counts(rounds=2, evaluations=1, bytes_in=10, bytes_out=1005)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_tally_counts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tally"
    assert read_tally(path) == Counts()
    path.write_bytes(b"x" * 1000)
    assert read_tally(path) == Counts()
    Tally(path).sent(7)
    assert read_tally(path) == Counts(bytes_out=7)
