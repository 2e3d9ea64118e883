from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flops.cli.follow import Away, Back, follow
from flops.cli.launch import find
from flops.client.events import ProjectEvent, read_stream
from flops.core.errors import NotFoundError, UnavailableError

if TYPE_CHECKING:
    from tests.cli.conftest import StandIn

PROJECT = "p-7k2mqd"


def test_a_stream_is_read_past_comments_and_unknown_fields() -> None:
    lines = [
        ": heartbeat", "", "retry: 3", "id: 7", "event: warning", 'data: {"seq": 7, "time": 1, "kind": "x",',
        'data: "data": {"a": 1}}', "", ": cut off here", 'data: {"seq": 8',
    ]  # fmt: skip
    (event,) = read_stream(lines)
    assert (event.seq, event.kind, event.data) == (7, "x", {"a": 1})


def test_a_restart_is_bridged_without_losing_or_repeating_an_event(stand_in: "StandIn") -> None:
    stand_in.add_project()
    stand_in.emit("warning", message="1")
    stand_in.emit("warning", message="2")
    seen: list[object] = []
    naps: list[float] = []
    for item in follow(PROJECT, lambda: find(stand_in.settings), pause=naps.append):
        seen.append(item)
        if isinstance(item, ProjectEvent) and item.seq == 2:
            stand_in.kill()
            stand_in.emit("warning", message="3")
        if isinstance(item, Away):
            stand_in.up()
        if isinstance(item, Back):
            stand_in.emit("project.state", state="finished", reason=None)
    assert [item.seq for item in seen if isinstance(item, ProjectEvent)] == [1, 2, 3, 4]
    assert [type(item).__name__ for item in seen if not isinstance(item, ProjectEvent)] == ["Away", "Back"]
    assert stand_in.stream_starts == [0, 2]
    assert naps


def test_patience_ends(tmp_path: Path) -> None:
    items = follow(PROJECT, lambda: None, patience_s=-1, pause=lambda _: None)
    assert isinstance(next(items), Away)
    with pytest.raises(UnavailableError, match="come back with 'flops attach p-7k2mqd'"):
        next(items)


def test_an_unknown_project_is_an_error_not_a_wait(stand_in: "StandIn") -> None:
    with pytest.raises(NotFoundError, match="there is no project p-none22"):
        next(follow("p-none22", lambda: find(stand_in.settings)))
