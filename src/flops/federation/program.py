"""The programs of the federation: how they begin, and what they need of the interpreter, the C library's heap
and the operating system.
"""

import argparse
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from flops.core.errors import UnavailableError
from flops.core.memory import use_one_arena
from flops.telemetry import log_lines

_SWITCH_S = 0.1
_FILES_EACH = 5
"""Open files of one learner: in the agent or in its worker its models, update and data, in the aggregator its
connection and spool file."""
_FILES_BESIDE = 256


def begin(name: str, arguments: Sequence[str] | None) -> Path:
    """What every program does first; returns the path of its configuration.

    Args:
        arguments: None: those of the command line.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(arguments)
    use_one_arena()
    expect_many_threads()
    log_lines(name.rpartition(".")[2])
    path: Path = options.config
    return path


def end_on_signals(leave: Callable[[], None] = lambda: None) -> None:
    """End when told to (SIGTERM, SIGINT), whatever the main thread is doing; also as the first process of a
    container, which gets only signals that it has a handler for.

    Python runs a handler only between two steps of its main thread, which may be waiting in the transport for
    hours; the byte that a signal writes wakes a thread at once. Blocking signals and waiting for them would
    not do: threads that libraries have started before would take them.

    Args:
        leave: is done before.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        number = reading.recv(1)[0]
        writing.close()
        leave()
        os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def raise_file_limit(learners: int) -> None:
    """Allow this process, and those it starts, the open files that its learners need.

    Raises:
        UnavailableError: the system does not allow as many.
    """
    needed = learners * _FILES_EACH + _FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UnavailableError(
            f"{learners} learners in one process need {needed} open files, the system allows {hard}"
            " - raise its limit (ulimit -Hn), or train with fewer learners"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def expect_many_threads() -> None:
    """Let threads that wait for the interpreter sleep until it is given to them.

    Each of them would wake every 5 ms to ask for it; with a thousand members that is what the processor does.
    Nobody here computes for long, and whoever waits for the network lets others in: each of 1,000 virtual
    learners costs the aggregator 2.0 ms of processor time a round instead of 3.2, and their agent as much.
    """
    sys.setswitchinterval(_SWITCH_S)
