"""``python -m flops.node --home DIR``: the node of a machine that has joined a manager.

It runs until it is told to end: SIGTERM and SIGINT end it with all that it runs for projects; SIGHUP lets it
look again at what its owner allows and at the data. Killed otherwise, it leaves everything running, and the
next one adopts it.

Exit codes: 0 told to end, 1 it cannot run, 3 the manager does not know this node any more.
"""

import argparse
import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from flops.core.errors import FlopsError
from flops.node.data import OWN
from flops.node.home import NodeHome
from flops.node.link import Link
from flops.node.program import Program
from flops.orchestration import ProcessOrchestrator
from flops.telemetry import log_lines

log = logging.getLogger(__name__)

EJECTED = 3
_SECRETS = ("FLOPS_TOKEN", "FLOPS_MANAGER", "FLOPS_MANAGER_CA", "FLOPS_DATABASE")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flops.node", description="Run a joined node.")
    parser.add_argument(
        "--home", type=Path, required=True, help="FLOPS_HOME; the node's things are in DIR/node"
    )
    home = NodeHome(parser.parse_args(arguments).home)
    for name in _SECRETS:  # nothing for those whom we start
        os.environ.pop(name, None)
    os.umask(0o077)
    log_lines("node")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        membership = home.required_membership()
        if membership.ejected is not None:
            log.error("the manager does not know this node any more - join again with 'flops node join'")
            return EJECTED
        home.make()
        home.claim()  # let go of when this process ends, however it does
    except FlopsError as error:
        log.error("%s", error)
        return 1
    orchestrator = ProcessOrchestrator(home.settings.services_dir, home.settings.logs_dir)
    try:
        with Link(membership.url, membership.ca, membership.credential) as link:
            program = Program(home, membership, orchestrator, link)
            return _run(program, orchestrator)
    except FlopsError as error:
        log.error("%s", error)
        return 1
    finally:
        orchestrator.close()


def _run(program: Program, orchestrator: ProcessOrchestrator) -> int:
    told, telling = socket.socketpair()
    telling.setblocking(False)
    signal.set_wakeup_fd(telling.fileno(), warn_on_full_buffer=False)
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(handled, lambda *_: None)
    ejected: list[str | None] = []

    def take_part() -> None:
        try:
            ejected.append(program.run())
        finally:
            telling.send(b"\0")

    threading.Thread(target=take_part, name="listen", daemon=True).start()
    # Handlers do nothing: they might run while this thread holds a lock. The byte that a signal leaves does.
    while (number := told.recv(1)[0]) == signal.SIGHUP:
        program.look_again()
    if number:
        log.info("ends on %s", signal.Signals(number).name)
        program.end()
        program.stop_learners("the node was stopped by its owner")
    program.close()
    orchestrator.stop_many([status.name for status in orchestrator.list(OWN) if status.live], 3.0)
    if number:
        return 0
    return EJECTED if ejected else 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # an answer of the manager that is still waited for must not keep it
