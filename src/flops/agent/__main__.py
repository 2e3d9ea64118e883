"""``python -m flops.agent --config FILE``: take part in a training, for one learner or for many virtual ones.

Starts the user's code in workers, and fetches the learners' own fragments from their node's data server when
that code asks for them.

Exit codes: 0 the project is over, 1 the user's code or its data ended its learner's part (where there are
many: that of all of them), 2 the configuration or the machine is unusable, 143 and 130 it was told to end
(SIGTERM, SIGINT).
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence

from flops.agent.crew import Crew
from flops.core.errors import FlopsError
from flops.federation import AgentConfig
from flops.federation.program import begin, raise_file_limit

log = logging.getLogger(__name__)

_END_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    path = begin("flops.agent", arguments)
    try:
        config = AgentConfig.read(path)
        raise_file_limit(len(config.learners()))
        crew = Crew(config)
    except FlopsError as error:
        log.error("%s", error)
        return 2
    end_on_signals(crew)
    try:
        crew.take_part()
    except FlopsError as error:
        log.error("%s", error)
        return 1
    finally:
        end(crew)
    return 0


def end(crew: Crew) -> None:
    """End the workers and clean up after them, also from within a request.

    A worker that waits for its data cannot be waited for; it dies with this process.
    """
    ending = threading.Thread(target=crew.kill, daemon=True)
    ending.start()
    ending.join(_END_S)


def end_on_signals(crew: Crew) -> None:
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
        end(crew)
        os._exit(128 + number)

    threading.Thread(target=watch, name="signals", daemon=True).start()


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # threads that wait in the transport or for data must not keep it
