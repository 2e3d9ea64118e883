"""The aggregator of one project: ``python -m flops.federation.aggregator --config FILE``.

It carries no ML library and no user code; learners connect to it. Killed at any moment and started again with
the same configuration, it goes on after the last committed round.

Exit codes: 0 the training finished, 1 it failed (the reason is reported), 2 the configuration is unusable.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flops.core.clock import SystemClock
from flops.core.errors import FlopsError, InvalidInputError
from flops.core.events import EventKind
from flops.federation.checkpoint import Checkpoint
from flops.federation.config import AggregatorConfig
from flops.federation.flower import claim_process
from flops.federation.hub import Hub, Server
from flops.federation.memory import use_one_arena
from flops.federation.reports import Reporter
from flops.federation.training import SynchronousTraining

log = logging.getLogger(__name__)

_LAST_REPORTS_S = 600.0


def aggregate(config: AggregatorConfig) -> int:
    """Run one training from its configuration to its end; returns the exit code."""
    clock = SystemClock()
    state = Path(config.state_dir)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    reporter = Reporter(state / "reports.jsonl", config.report, clock)
    code, reason = 0, "the training has finished"
    hub = None
    try:
        claim_process()
        checkpoint = Checkpoint(state, Path(config.initial_model))
        model = checkpoint.model()
        hub = Hub(config.project, model.layout, config.members)
        model.close()
        loop = SynchronousTraining(
            config.project, config.plan, config.members, hub, checkpoint, reporter, clock
        )
        server = _serve(config, hub)
        log.info("listening on port %s, round %s is committed", server.port, checkpoint.committed.round)
        outcome = loop.run()
        reporter.report(
            EventKind.TRAINING_FINISHED,
            rounds=outcome.rounds,
            best_round=outcome.best_round,
            model_file=str(outcome.model_file),
            metrics=dict(outcome.metrics),
        )
    except FlopsError as error:
        log.error("%s", error)
        reporter.report(EventKind.TRAINING_FAILED, reason=str(error))
        code, reason = 1, str(error)
    except Exception as error:  # whatever it is, the project has to hear that nothing more will come
        log.exception("the aggregator cannot go on")
        code, reason = 1, f"{type(error).__name__}: {error}"
        reporter.report(
            EventKind.TRAINING_FAILED,
            reason=f"the aggregator of project {config.project} cannot go on: {reason}",
        )
    if hub is not None:
        hub.stop_all(reason)
        if config.listen.startswith("grpc+unix://"):
            Path(config.listen.removeprefix("grpc+unix://")).unlink(missing_ok=True)
    reporter.flush(_LAST_REPORTS_S)
    reporter.close()
    return code


def _serve(config: AggregatorConfig, hub: Hub) -> Server:
    os.umask(0o077)
    try:
        return Server(config.listen, hub, config.tls)
    except Exception as error:  # pyarrow raises several kinds here
        raise InvalidInputError(
            f"the aggregator cannot listen on {config.listen}: {error} - is the address taken?"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flops.federation.aggregator")
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(arguments)
    use_one_arena()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        config = AggregatorConfig.read(options.config)
    except FlopsError as error:
        log.error("%s", error)
        return 2
    return aggregate(config)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except Exception:
        log.exception("the aggregator ends")
    finally:
        logging.shutdown()
        # Calls of learners that hang would keep the server's shutdown waiting; what counts is on disk.
        os._exit(code)
