"""An aggregator, a root's or a cluster's: ``python -m flops.federation.aggregator --config FILE``.

It carries no ML library and no user code; learners connect to it. Killed at any moment and started again with
the same configuration, it goes on after the last committed round.

Exit codes: 0 the training finished (of a cluster: is over), 1 it failed (the reason is reported), 2 the
configuration is unusable, 75 there is no space on its disk: it can be started again when there is, 143 and
130 it was told to end (SIGTERM, SIGINT).
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from flops.core.clock import Clock, SystemClock
from flops.core.errors import FlopsError, InvalidInputError
from flops.core.events import EventKind
from flops.federation.asynchronous import AsynchronousTraining
from flops.federation.checkpoint import Checkpoint
from flops.federation.cluster import Cluster
from flops.federation.config import AggregatorConfig, Link, Member
from flops.federation.conversation import Conversation, keep_beating
from flops.federation.flower import claim_process
from flops.federation.hub import Hub, Server
from flops.federation.placement import Placement
from flops.federation.postbox import sha256_of
from flops.federation.program import begin, end_on_signals, raise_file_limit
from flops.federation.reports import Reporter
from flops.federation.roster import slots_of
from flops.federation.space import lacks_space, needing_space
from flops.federation.strategies import ASYNCHRONOUS
from flops.federation.training import SynchronousTraining
from flops.telemetry import always, record_spans, send_spans, within

log = logging.getLogger(__name__)

_LAST_REPORTS_S = 600.0


def aggregate(config: AggregatorConfig) -> int:
    """Run one training, or a cluster's part in one, to its end; returns the exit code."""
    state = Path(config.state_dir)
    with needing_space(state, f"the training of project {config.project}"):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _aggregate(config, state)


def _aggregate(config: AggregatorConfig, state: Path) -> int:
    clock = SystemClock()
    cluster = config.parent.member if config.parent else None
    reporter = Reporter(state / "reports.jsonl", config.report, clock, cluster)
    code, reason = 0, "the training has finished"
    hub = None
    try:
        claim_process()
        checkpoint = Checkpoint(state, Path(config.initial_model))
        model = checkpoint.model()
        members = config.members
        if config.parent is not None and config.parent.placed:
            members = _placed_members(config, config.parent)
        placement = _placement(config, state)
        hub = Hub(config.project, model.layout, members)
        model.close()
        carry_out = _prepare(replace(config, members=members), hub, checkpoint, reporter, clock)
        server = _serve(config, hub, placement)
        where = f"port {server.port}" if server.port > 0 else config.listen  # a socket has none
        log.info("listening on %s, round %s is committed", where, checkpoint.committed.round)
        if placement is not None:
            clusters, round_trips_s = placement.wait()
            if checkpoint.committed.round == 0:
                milliseconds = {name: round(1000 * taken, 3) for name, taken in round_trips_s.items()}
                reporter.report(EventKind.CLUSTERS_FORMED, clusters=clusters, round_trip_ms=milliseconds)
        carry_out()
    except FlopsError as error:
        if lacks_space(error):
            raise
        log.error("%s", error)
        code, reason = 1, str(error)
    except Exception as error:  # whatever it is, the project has to hear that nothing more will come
        if lacks_space(error):
            raise
        log.exception("the aggregator cannot go on")
        code, reason = 1, f"{type(error).__name__}: {error}"
        reason = f"the aggregator of project {config.project} cannot go on: {reason}"
    if code and not cluster:
        reporter.report(EventKind.TRAINING_FAILED, reason=reason)
    if hub is not None:
        hub.stop_all(reason)
        if config.listen.startswith("grpc+unix://"):
            Path(config.listen.removeprefix("grpc+unix://")).unlink(missing_ok=True)
    reporter.flush(_LAST_REPORTS_S)
    reporter.close()
    return code


def _prepare(
    config: AggregatorConfig, hub: Hub, checkpoint: Checkpoint, reporter: Reporter, clock: Clock
) -> Callable[[], None]:
    """What this aggregator does once it listens."""
    if config.parent is not None:
        cluster = Cluster(config, hub, checkpoint, reporter, clock)

        def take_part() -> None:
            work = threading.Thread(target=cluster.work, name="work", daemon=True)
            work.start()
            threading.Thread(
                target=keep_beating, args=([cluster.conversation],), name="beat", daemon=True
            ).start()
            cluster.conversation.run()
            hub.wake()
            work.join(1.0)  # members that leave because the project is over are no news

        return take_part
    kind = AsynchronousTraining if config.plan.strategy in ASYNCHRONOUS else SynchronousTraining
    training = kind(config.project, config.plan, config.members, hub, checkpoint, reporter, clock)

    def train() -> None:
        outcome = training.run()
        model = {"model_file": str(outcome.model_file)}
        if config.report is not None and config.report.upload:
            model["model_sha256"] = sha256_of(outcome.model_file)
        reporter.report(
            EventKind.TRAINING_FINISHED,
            rounds=outcome.rounds,
            best_round=outcome.best_round,
            metrics=dict(outcome.metrics),
            **model,
        )

    return train


def _placement(config: AggregatorConfig, state: Path) -> Placement | None:
    if not config.newcomers:
        return None
    slots = slots_of(config.newcomers)
    return Placement(
        state / "placement.json",
        sorted(slots, key=slots.__getitem__),
        config.addresses,
        config.plan.start_deadline_s,
    )


def _placed_members(config: AggregatorConfig, parent: Link) -> dict[str, Member]:
    """Wait for the root's word on which learners are this cluster's."""
    names = Conversation(parent).ask_for_members()
    return {name: member for name, member in config.members.items() if name in names}


def _serve(config: AggregatorConfig, hub: Hub, placement: Placement | None) -> Server:
    os.umask(0o077)
    try:
        return Server(config.listen, hub, config.tls, placement, config.newcomers)
    except Exception as error:  # pyarrow raises several kinds here
        raise InvalidInputError(
            f"the aggregator cannot listen on {config.listen}: {error} - is the address taken?"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    path = begin("flops.federation.aggregator", arguments)
    end_on_signals()
    try:
        config = AggregatorConfig.read(path)
        always(project=config.project, request=config.traced.request)
        record_spans("aggregator", config.traced.collector)
        raise_file_limit(len(config.members) + len(config.newcomers))
    except FlopsError as error:
        log.error("%s", error)
        return 2
    with within(config.traced.parent):
        return aggregate(config)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except Exception:
        log.exception("the aggregator ends")
    finally:
        send_spans()
        logging.shutdown()
        # Calls of learners that hang would keep the server's shutdown waiting; what counts is on disk.
        os._exit(code)
