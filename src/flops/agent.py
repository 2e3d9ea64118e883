"""The agent of one learner: ``python -m flops.agent --config FILE``.

The program that runs beside the data. It starts the user's code in a worker, fetches the learner's own
fragments from its node's data server when that code asks for them, and takes part in the training.

Exit codes: 0 the project is over, 1 the user's code or its data ended this learner's part, 2 the
configuration is unusable, 143 and 130 it was told to end (SIGTERM, SIGINT).
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from flops.core.errors import FlopsError
from flops.federation import AgentConfig, DataAccess
from flops.federation.conversation import Conversation, keep_beating
from flops.federation.learner import Learner
from flops.federation.memory import use_one_arena
from flops.federation.model_file import anonymous_file
from flops.guest import Guest, Room

log = logging.getLogger(__name__)

_END_S = 3.0


def fetch_dataset(access: DataAccess | None) -> Sequence[int]:
    """The learner's own fragments as one open Arrow IPC file; the caller closes it."""
    if access is None:
        return []
    from flops.data import DataClient  # learners without data do not need it

    fd = anonymous_file("flops-data")
    try:
        with DataClient(access.location, access.token) as client:
            client.write_matching(access.tags, access.site, fd)
    except BaseException:
        os.close(fd)
        raise
    return [fd]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.agent")
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(arguments)
    use_one_arena()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = AgentConfig.read(options.config)
        guest = Guest.start(
            Room(Path(config.python), Path(config.code)),
            log=Path(config.log) if config.log else None,
            isolate=config.isolate,
            threads=config.threads,
            seed=config.seed,
            memory_mb=config.memory_mb,
            dataset=lambda: fetch_dataset(config.data),
        )
    except FlopsError as error:
        log.error("%s", error)
        return 2
    end_on_signals(guest)
    log.info("the worker runs, isolation: %s", guest.isolation)
    try:
        conversation = Conversation(config.link)
        learner = Learner(config.learner, conversation, guest)
        threading.Thread(target=learner.work, name="work", daemon=True).start()
        threading.Thread(target=keep_beating, args=([conversation],), name="beat", daemon=True).start()
        conversation.run()
    except FlopsError as error:
        log.error("%s", error)
        return 1
    finally:
        end(guest)
    return 0


def end(guest: Guest) -> None:
    """End the worker and clean up after it, also from within a request.

    A worker that waits for its data cannot be waited for; it dies with this process.
    """
    ending = threading.Thread(target=guest.kill, daemon=True)
    ending.start()
    ending.join(_END_S)


def end_on_signals(guest: Guest) -> None:
    """Leave nothing behind when told to end, whatever this process is doing.

    Python runs a handler only between two steps of its main thread, which may be waiting in the transport for
    hours; the byte that a signal writes wakes a thread at once.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        number = reading.recv(1)[0]
        writing.close()
        end(guest)
        os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # threads that wait in the transport or for data must not keep it
