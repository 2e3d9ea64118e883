"""``python -m flops.agent --config FILE``: take part in a training, for one learner or for many virtual ones.

Runs the user's code in workers that it starts, or in one that comes from a container of its own, and fetches
the learners' own fragments from their node's data server when that code asks for them.

Exit codes: 0 the project is over, 1 the user's code or its data ended its learner's part (where there are
many: that of all of them), 2 the configuration or the machine is unusable, 143 and 130 it was told to end
(SIGTERM, SIGINT).
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence

from flops.agent.crew import Crew
from flops.core.errors import FlopsError
from flops.federation import AgentConfig
from flops.federation.program import begin, end_on_signals, raise_file_limit
from flops.telemetry import always, record_spans, send_spans

log = logging.getLogger(__name__)

_END_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    path = begin("flops.agent", arguments)
    try:
        config = AgentConfig.read(path)
        always(project=config.project, learner=config.learner, request=config.traced.request)
        record_spans("agent", config.traced.collector)
        raise_file_limit(len(config.learners()))
        crew = Crew(config)
    except FlopsError as error:
        log.error("%s", error)
        return 2
    end_on_signals(lambda: end(crew.kill))  # it may be started again, and needs its worker then
    try:
        crew.take_part()
    except FlopsError as error:
        log.error("%s", error)
        return 1
    finally:
        end(crew.dismiss)
    return 0


def end(workers: Callable[[], None]) -> None:
    """End the workers and clean up after them, also from within a request.

    A worker that waits for its data cannot be waited for; it dies with this process.
    """
    ending = threading.Thread(target=workers, daemon=True)
    ending.start()
    ending.join(_END_S)


if __name__ == "__main__":
    code = main()
    send_spans()
    logging.shutdown()
    os._exit(code)  # threads that wait in the transport or for data must not keep it
