"""A project's events as they happen, across restarts of the manager."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flops.client import Client, ManagerAwayError, ProjectEvent
from flops.client.events import RESTING, read_stream
from flops.core.errors import UnavailableError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


@dataclass(frozen=True)
class Away:
    """The manager cannot be reached; sent once, until it is back."""

    reason: str


@dataclass(frozen=True)
class Back:
    """The manager is reached again."""


def follow(
    project: str,
    find: Callable[[], Client | None],
    *,
    after: int = 0,
    patience_s: float = 600.0,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[ProjectEvent | Away | Back]:
    """Every event after ``after``, each once and in order, until the project rests.

    A project may have rested and gone on before: only the manager knows which end is the last one so far,
    and ends the stream there.

    Args:
        find: the manager, or None while there is none; asked again whenever the stream breaks.
        patience_s: how long a manager may be away.
    Raises:
        UnavailableError: it was away for longer than that.
        NotFoundError: there is no such project.
    """
    seen = after
    state: str | None = None
    away_since: float | None = None
    pause_s = _FIRST_PAUSE_S
    while True:
        reason = "there is none"
        try:
            client = find()
            if client is not None:
                with client, client.event_stream(project, seen) as lines:
                    if away_since is not None:
                        away_since = None
                        yield Back()
                    pause_s = _FIRST_PAUSE_S
                    before = seen
                    for event in read_stream(lines):
                        if event.seq > seen:
                            seen, state = event.seq, event.state or state
                            yield event
                    if seen == before:  # all was told before
                        state = str(client.get_project(project)["state"])
                    if state in RESTING:
                        return
                # A manager that shuts down closes its streams first: look again before calling it away.
                pause(pause_s)
                continue
        except ManagerAwayError as error:
            reason = str(error)
        except UnavailableError as error:  # it answers, but is starting or ending
            reason = str(error)
        now = time.monotonic()
        if away_since is None:
            away_since = now
            yield Away(reason)
        elif now - away_since > patience_s:
            raise UnavailableError(
                f"the manager has been away for {patience_s / 60:.0f} minutes - start it with 'flops up', "
                f"then come back with 'flops attach {project}'"
            )
        pause(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
