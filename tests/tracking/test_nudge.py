import threading
from pathlib import Path

import pytest

from flops.core.errors import ConflictError
from flops.tracking.nudge import Listener, Nudge


def test_ringing_without_a_listener_is_harmless(tmp_path: Path) -> None:
    nudge = Nudge(tmp_path / "bell")
    nudge.ring()
    Listener(nudge.path).close()
    nudge.ring()


def test_a_listener_is_woken_by_another_thread(tmp_path: Path) -> None:
    nudge = Nudge(tmp_path / "bell")
    with Listener(nudge.path) as ear:
        thread = threading.Thread(target=nudge.ring)
        thread.start()
        assert ear.wait(30)
        thread.join()


def test_all_nudges_so_far_count_as_one_and_never_block(tmp_path: Path) -> None:
    nudge = Nudge(tmp_path / "bell")
    with Listener(nudge.path) as ear:
        for _ in range(70_000):  # more than a pipe holds
            nudge.ring()
        assert ear.wait(0)
        assert not ear.wait(0)
        nudge.ring()
        assert ear.wait(None)


def test_a_path_longer_than_a_socket_s_works(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with Listener(folder / "bell") as ear:
        Nudge(folder / "bell").ring()
        assert ear.wait(0)


def test_a_path_that_is_no_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bell").write_text("")
    with pytest.raises(ConflictError, match="is not a named pipe"):
        Listener(tmp_path / "bell")
