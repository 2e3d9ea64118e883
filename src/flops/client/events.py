"""A project's events as they come over the wire."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flops.core.events import EventKind

HEARTBEAT_S = 10.0
"""How often the manager says that an event stream is alive."""

RESTING = frozenset({"finished", "failed", "stopped", "paused"})
"""States of a project in which nothing happens until somebody asks for it."""


@dataclass(frozen=True)
class ProjectEvent:
    """An event as it came; ``kind`` is text, so that a newer manager's kinds pass through."""

    seq: int
    time: float
    kind: str
    data: dict[str, Any]
    json: dict[str, Any]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ProjectEvent":
        return cls(value["seq"], value["time"], value["kind"], value["data"], value)

    @property
    def state(self) -> str | None:
        """The project's state from now on; None: the event changes none."""
        return str(self.data.get("state")) if self.kind == EventKind.PROJECT_STATE else None


class StreamParser:
    """Takes the lines of a text/event-stream; comments (heartbeats) and fields that we do not use are passed
    over.

    Source:
        HTML Living Standard, 9.2.6 "Interpreting an event stream".
    """

    def __init__(self) -> None:
        self._data: list[str] = []

    def feed(self, line: str) -> ProjectEvent | None:
        """The event that this line completes, if it does."""
        if line:
            field, _, value = line.partition(":")
            if field == "data":
                self._data.append(value.removeprefix(" "))
            return None
        if not self._data:
            return None
        event = ProjectEvent.from_json(json.loads("\n".join(self._data)))
        self._data.clear()
        return event


def read_stream(lines: Iterable[str]) -> Iterator[ProjectEvent]:
    """The events of a stream that was opened; see `StreamParser`."""
    parser = StreamParser()
    for line in lines:
        if (event := parser.feed(line)) is not None:
            yield event
