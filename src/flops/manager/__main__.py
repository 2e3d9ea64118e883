"""``python -m flops.manager --home DIR [--port N]``: one manager, until it is told to end.

The composition root: the only place that knows the floor above. Standard output stays empty; standard error
carries one JSON object a line, and a plain sentence where the manager cannot start.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path

from flops.api import serve
from flops.core.errors import ConflictError, FlopsError, InvalidInputError
from flops.core.settings import Settings
from flops.manager.home import claim_home
from flops.manager.manager import Manager
from flops.manager.orchestrators import open_orchestrator, open_programs, recall
from flops.web import Web


class JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main(arguments: list[str] | None = None) -> int:
    """Run a manager; answers the exit code."""
    try:
        settings = recall(_settings(arguments))
        home = claim_home(settings)
    except FlopsError as error:
        return _refuse(error)
    try:
        try:
            programs = open_programs(settings)
            orchestrator = open_orchestrator(settings, programs)
            listeners = home.listen(), home.listen_for_reports()
            network = home.listen_on_network()
            remote = home.listen_for_remote_reports(orchestrator.host) if orchestrator.runs_images else None
        except FlopsError as error:
            return _refuse(error)
        _log_to_stderr()
        try:
            manager = Manager(
                settings,
                programs=programs,
                orchestrator=orchestrator,
                reports_url=remote.url if remote is not None else None,
            )
        except FlopsError as error:
            return _refuse(error)
        try:
            try:
                manager.start()
            except ConflictError as error:
                return _refuse(error)
            serve(manager, home, *listeners, remote=remote, network=network, pages=Web())
            if not manager.active():
                manager.shut_down()
        finally:
            manager.close()
        return 0
    finally:
        home.leave()


def _settings(arguments: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m flops.manager", description="Run a FLOps manager.")
    parser.add_argument("--home", type=Path, help="FLOPS_HOME; default: the variable, else ~/.flops")
    parser.add_argument("--port", type=int, help="of the REST API on 127.0.0.1; default: any free one")
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
    if options.port is not None:
        settings = dataclasses.replace(settings, port=options.port)
    if not 0 <= settings.port < 1 << 16:
        raise InvalidInputError(f"{settings.port} is no port - use 1 to 65535, or leave it out")
    return settings


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # each look at a served model


def _refuse(error: FlopsError) -> int:
    sys.stderr.write(f"{error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
