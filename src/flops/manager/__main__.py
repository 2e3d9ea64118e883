"""``python -m flops.manager --home DIR [--port N]``: one manager, until it is told to end.

The composition root: the only place that knows the floor above. Standard output stays empty; standard error
carries log lines (`flops.telemetry`), and a plain sentence where the manager cannot start.
"""

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import sqlalchemy as sa

from flops.api import Standby, serve
from flops.core.errors import ConflictError, FlopsError, InvalidInputError
from flops.core.memory import use_one_arena
from flops.core.settings import Settings
from flops.manager.databases import open_own_database
from flops.manager.home import Home, claim_home
from flops.manager.manager import Manager
from flops.manager.orchestrators import PROCESS, open_orchestrator, open_programs, recall
from flops.persistence import lease_of
from flops.telemetry import collector_of, log_lines, record_spans, send_spans
from flops.web import Web

log = logging.getLogger("flops.manager")

LOST_EXIT_CODE = 4
"""Another manager has taken over."""
_SWITCH_S = 0.0005
"""A thread that computes lets the event loop go on after so long, not after Python's 5 ms: a request waits
for its turn several times. Measured under ten projects and 50 clients: decision 23."""


def main(arguments: list[str] | None = None) -> int:
    """Run a manager; answers the exit code."""
    use_one_arena()
    sys.setswitchinterval(_SWITCH_S)
    try:
        settings = recall(_settings(arguments))
        home = claim_home(settings, shared=settings.database_url is not None)
    except FlopsError as error:
        return _refuse(error)
    try:
        try:
            api = home.listen()
            database = _stand_by(settings, home, api) if settings.standby else open_own_database(settings)
        except FlopsError as error:
            return _refuse(error)
        if database is None:
            return 0
        try:
            return _manage(recall(settings), home, api, database)
        finally:
            send_spans()
            home.withdraw()
            database.dispose()
    finally:
        home.leave()


def _stand_by(settings: Settings, home: Home, api: socket.socket) -> sa.Engine | None:
    """Wait until no other manager acts; None: the waiting was ended by a signal."""
    from flops.persistence.lease import GivenUp, Holder, StandBy

    _log_to_stderr()
    given_up = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: given_up.set())
    standby = Standby(api)

    def told(holder: Holder) -> None:
        if settings.orchestrator == PROCESS and not holder.is_here:
            raise ConflictError(
                f"{holder} runs its services as processes of its machine, which nobody adopts from here - "
                "let one stand by there, or run services with FLOPS_ORCHESTRATOR=docker or swarm"
            )
        log.info("standing by for %s", holder)
        standby.tell(holder.address, str(holder))

    log.info("standing by at %s", home.announce_standby(api))
    try:
        database = open_own_database(settings, StandBy(given_up, told))
    except GivenUp:
        return None
    finally:
        standby.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if given_up.is_set():
        database.dispose()
        return None
    log.info("no other manager acts any more: this one takes over")
    return database


def _manage(settings: Settings, home: Home, api: socket.socket, database: sa.Engine) -> int:
    lease = lease_of(database)
    if lease is not None:
        lease.on_lost = _end_at_once
    may_act = (lambda: lease.holds) if lease is not None else (lambda: True)
    try:
        programs = open_programs(settings, may_act)
        orchestrator = open_orchestrator(settings, programs, may_act)
        if lease is not None and (settings.listen is not None or orchestrator.runs_images):
            lease.end_predecessor()  # others know its ports
        reports = home.listen_for_reports()
        network = home.listen_on_network()
        remote = home.listen_for_remote_reports(orchestrator.host) if orchestrator.runs_images else None
        _log_to_stderr()
        record_spans("manager", collector_of())
        manager = Manager(
            settings,
            programs=programs,
            orchestrator=orchestrator,
            reports_url=remote.url if remote is not None else None,
            network_names=network.names if network is not None else (),
            database=database,
        )
    except FlopsError as error:
        return _refuse(error)
    try:
        try:
            manager.start()
        except ConflictError as error:
            return _refuse(error)
        serve(manager, home, api, reports, remote=remote, network=network, pages=Web())
        if not manager.active():
            manager.shut_down()
    finally:
        home.withdraw()  # before the lease ends with the manager: another one may announce itself then
        manager.close()
    return 0


def _end_at_once(reason: str) -> None:
    """Another manager acts: nothing may be cleaned up here, all of it is that one's."""
    log.critical("%s: the process ends", reason)
    logging.shutdown()
    os._exit(LOST_EXIT_CODE)


def _settings(arguments: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m flops.manager", description="Run a FLOps manager.")
    parser.add_argument("--home", type=Path, help="FLOPS_HOME; default: the variable, else ~/.flops")
    parser.add_argument("--port", type=int, help="of the REST API on 127.0.0.1; default: any free one")
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait until the manager that acts on the same PostgreSQL has ended, then take over",
    )
    parser.add_argument("--listen", help="HOST[:PORT] where it answers other machines as well, over TLS")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.from_environment()
    except ValueError as error:
        raise InvalidInputError(str(error)) from error
    os.environ.pop("FLOPS_DATABASE", None)  # its password is nothing for those whom we start
    if options.home is not None:
        settings = dataclasses.replace(settings, home=options.home.expanduser().absolute())
    if options.listen is not None:
        settings = dataclasses.replace(settings, listen=options.listen)
    if options.standby:
        settings = dataclasses.replace(settings, standby=True)
    if settings.standby and settings.database_url is None:
        raise InvalidInputError(
            "a manager on SQLite has nobody to stand by for it - name a PostgreSQL that both share with "
            "FLOPS_DATABASE"
        )
    if options.port is not None:
        settings = dataclasses.replace(settings, port=options.port)
    if not 0 <= settings.port < 1 << 16:
        raise InvalidInputError(f"{settings.port} is no port - use 1 to 65535, or leave it out")
    return settings


def _log_to_stderr() -> None:
    if logging.getLogger().handlers:
        return
    log_lines("manager")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # each look at a served model


def _refuse(error: FlopsError) -> int:
    sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
