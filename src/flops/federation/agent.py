"""A learner's conversation with its aggregator: tasks in, answers out, for as long as the project lives.

Two threads share it. One keeps the connection: it connects outward only, reconnects with jittered back-off
while the user's code goes on, and notices at once that the project is over. The other works: it asks the
user's code (`flops.guest`) for one thing at a time. The last answer is kept, so a task that is asked again
after a cut is answered without training again. Whatever happens in the user's code ends this learner's part
with a clear error, never the agent's or anyone else's.
"""

import logging
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.flight as flight

from flops.core.errors import FailedError, FlopsError
from flops.federation import wire
from flops.federation.blocks import Block, blocks
from flops.federation.config import AgentConfig
from flops.federation.model_file import ModelWriter, layout_digest
from flops.guest import Guest, GuestClosed, GuestError
from flops_worker.tensors import Layout, LayoutError

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 5.0
_BEAT_S = 20.0
# A gRPC server, which pyarrow lets nobody configure, hangs up on clients that ping more often than every
# 300 s while nothing else is said. So a message of ours keeps the connection in use and finds it dead: where
# pings are on, TCP gives it `keepalive_timeout` to be acknowledged.
_KEEPALIVE = [("grpc.keepalive_time_ms", 320_000), ("grpc.keepalive_timeout_ms", 20_000)]
_LOST = (flight.FlightError, OSError)


class _StopError(Exception):
    """The aggregator ended the project."""


@dataclass(frozen=True)
class _Job:
    """One task on its way to the user's code; ``model_fd`` is the job's own."""

    key: tuple[str, int]
    header: dict[str, Any]
    model_fd: int


@dataclass(frozen=True)
class _Answer:
    """The last answer, and the update that goes with it: small ones beside it, others from their file."""

    key: tuple[str, int]
    header: dict[str, Any]
    body: bytes | None = None
    update_fd: int = -1
    update_offset: int = 0


class Agent:
    """One learner's conversation with its aggregator."""

    def __init__(self, config: AgentConfig, guest: Guest) -> None:
        self._config = config
        self._guest = guest
        self._allows_metrics = True
        # Of the thread that keeps the connection:
        self._reader: Any = None
        self._layout = Layout(())
        self._digest = ""
        self._blocks: tuple[Block, ...] = ()
        self._model: tuple[int, int] | None = None  # version, file descriptor
        self._connections = 0
        self._pause_s = _FIRST_PAUSE_S
        # Of both, under the lock, which also keeps their messages apart:
        self._changed = threading.Condition()
        self._writer: Any = None
        self._loaded = False
        self._asked: tuple[str, int] | None = None
        self._pending: _Job | None = None
        self._working_on: tuple[str, int] | None = None
        self._answer: _Answer | None = None
        self._failure: FlopsError | None = None

    def run(self) -> None:
        """Take part until the project is over.

        Raises:
            FlopsError: the user's code or its data ended this learner's part; the aggregator was told.
        """
        for work in (self._work, self._beat):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        while True:
            client = None
            try:
                client = self._connect()
                self._converse()
            except _StopError as stop:
                if self._failure is not None:
                    raise self._failure from None
                log.info("the project is over: %s", stop)
                return
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
                raise FlopsError(f"the aggregator refused learner {self._config.learner}: {error}") from error
            except StopIteration:
                if self._failure is not None:
                    raise self._failure from None
                self._wait("it closed the connection")
            except (*_LOST, wire.WireError) as error:
                self._wait(type(error).__name__)
            finally:
                with self._changed:
                    self._writer = None
                if client is not None:
                    self._reader.cancel()  # closing a client leaves its open calls open
                    client.close()

    def _wait(self, reason: str) -> None:
        log.info("the aggregator is away (%s), trying again", reason)
        # Jitter, so that many learners do not return in one instant.
        time.sleep(self._pause_s * random.uniform(0.5, 1.5))  # noqa: S311
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _connect(self) -> Any:
        tls = self._config.tls
        client = flight.FlightClient(
            self._config.aggregator,
            tls_root_certs=Path(tls.ca).read_bytes() if tls and tls.ca else None,
            generic_options=_KEEPALIVE,
        )
        self._reader = None
        try:
            options = flight.FlightCallOptions(
                headers=[(b"authorization", f"Bearer {self._config.token}".encode())]
            )
            descriptor = flight.FlightDescriptor.for_command(b"flops-federation-1")
            writer, self._reader = client.do_exchange(descriptor, options)
            writer.begin(wire.SCHEMA)
            wire.send(writer, {"t": "hello", "learner": self._config.learner})
            welcome = wire.receive(self._reader)
            if welcome.kind == "stop":
                raise _StopError(str(welcome.header.get("reason", "")))
            try:
                layout = Layout.from_header(welcome.header.get("layout"))
            except (LayoutError, TypeError) as error:
                raise wire.WireError(f"the model's description cannot be read: {error}") from error
            self._enter(writer, layout)
        except BaseException:
            if self._reader is not None:
                self._reader.cancel()
            client.close()
            raise
        return client

    def _enter(self, writer: Any, layout: Layout) -> None:
        """Begin a session: forget what belonged to the last one, and say how far we are."""
        self._forget_model()  # the aggregator sends what it thinks is missing to every new session
        self._connections += 1
        with self._changed:
            self._writer = writer
            self._layout, self._digest, self._blocks = layout, layout_digest(layout), blocks(layout)
            self._asked = None
            if self._failure is not None:
                self._say_failure()
            elif self._loaded:
                self._say_ready()

    def _converse(self) -> None:
        while True:
            message = wire.receive(self._reader)
            self._pause_s = _FIRST_PAUSE_S
            try:
                self._hear(message)
            except (KeyError, TypeError, ValueError) as error:
                raise wire.WireError(f"a message cannot be read: {error!r}") from error

    def _hear(self, message: wire.Received) -> None:
        header = message.header
        if message.kind == "stop":
            raise _StopError(str(header.get("reason", "")))
        if message.kind == "send":
            self._send_update(str(header["task"]))
        elif message.kind == "refused":
            log.warning("the aggregator refused our answer to %s: %s", header["task"], header["reason"])
        elif message.kind in ("train", "evaluate"):
            self._take_model(message)
            self._take_task(message)
        else:
            raise wire.WireError(f"an unknown message '{message.kind[:40]}'")

    def _take_task(self, message: wire.Received) -> None:
        """Answer again what was answered already, have the rest worked on; only the latest task counts."""
        assert self._model is not None
        # Training a round twice gives the same. A model to evaluate is not committed yet, and may be another
        # one when the aggregator was killed and has come back.
        life = 0 if message.kind == "train" else self._connections
        key = (str(message.header["task"]), life)
        with self._changed:
            self._asked = key
            if self._answer is not None and self._answer.key == key:
                self._say(self._answer.header, self._answer.body)
            elif self._working_on != key:
                self._drop_pending()
                self._pending = _Job(key, message.header, os.dup(self._model[1]))
                self._changed.notify_all()

    def _drop_pending(self) -> None:
        if self._pending is not None:
            os.close(self._pending.model_fd)
            self._pending = None

    def _take_model(self, message: wire.Received) -> None:
        """Keep the model that came along, in whatever form, as an anonymous file for the worker."""
        version = int(message.header["model"])
        follows = message.header.get("follows") is True
        if message.body is None and not follows and self._layout.nbytes:
            if self._model is None or self._model[0] != version:
                raise wire.WireError(f"model {version} was never sent")
            return
        writer = ModelWriter(self._layout)
        try:
            if follows:
                for block in self._blocks:
                    part = wire.receive(self._reader)
                    if part.kind != "body" or part.body is None or part.header.get("offset") != block.offset:
                        raise wire.WireError("a model's bytes do not follow its layout")
                    writer.write(block.offset, part.body)
            elif len(message.body or b"") != self._layout.nbytes:
                raise wire.WireError("a model does not fit its layout")
            else:
                writer.write(0, message.body or b"")
        except BaseException:
            writer.discard()
            raise
        self._forget_model()
        self._model = (version, writer.fd)

    def _forget_model(self) -> None:
        if self._model is not None:
            os.close(self._model[1])
            self._model = None

    def _send_update(self, task: str) -> None:
        with self._changed:
            answer = self._answer
        if answer is None or answer.header["task"] != task or answer.update_fd < 0:
            return  # it is too late for this update: another task came since
        for block in self._blocks:
            # Not mapped: user code holds this file too, and cutting it short under a mapping would kill us.
            data = os.pread(answer.update_fd, block.nbytes, answer.update_offset + block.offset)
            if len(data) != block.nbytes:
                self._fail(
                    FailedError("fit_model of the repository changed its update after it had returned it")
                )
                return
            with self._changed:
                wire.send(self._writer, {"t": "body", "task": task, "offset": block.offset}, data)

    def _say(self, header: dict[str, Any], body: bytes | None = None) -> None:
        """Send a message if there is a connection; `_enter` and tasks that are asked again repeat it."""
        try:
            if self._writer is not None:
                wire.send(self._writer, header, body)
        except _LOST:
            log.info("the connection is lost")  # the thread that reads it connects again

    def _say_ready(self) -> None:
        self._say({"t": "ready", "allows_metrics": self._allows_metrics})

    def _say_failure(self) -> None:
        error = self._failure
        self._say(
            {
                "t": "failed",
                "where": error.where if isinstance(error, GuestError) else "",
                "message": str(error),
                "traceback": "\n".join(error.traceback) if isinstance(error, GuestError) else "",
            }
        )

    def _fail(self, error: FlopsError) -> None:
        """This learner's part ends: the aggregator is told, and answers by ending the conversation."""
        with self._changed:
            self._failure = error
            self._say_failure()

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            with self._changed:
                self._say({"t": "beat"})

    def _work(self) -> None:
        """Load, then do the latest task, one after the other, until something fails."""
        try:
            self._guest.load()
            self._guest.load_data()
            with self._changed:
                self._loaded = True
                self._say_ready()
            while True:
                self._do(self._next_job())
        except GuestClosed:
            log.info("the worker was ended")  # by us, who have nothing more to say
        except FlopsError as error:
            self._fail(error)
        except Exception as error:
            log.exception("the agent's work failed")
            self._fail(FailedError(f"the agent of learner {self._config.learner} failed: {error!r}"))

    def _next_job(self) -> _Job:
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None)
            job, self._pending = self._pending, None
            assert job is not None
            self._working_on = job.key
            self._answer = None  # the next update is written where the last one is
            return job

    def _do(self, job: _Job) -> None:
        try:
            answer = self._train(job) if job.header["t"] == "train" else self._evaluate(job)
        finally:
            os.close(job.model_fd)
        with self._changed:
            self._answer, self._working_on = answer, None
            if self._asked == job.key:
                self._say(answer.header, answer.body)

    def _train(self, job: _Job) -> _Answer:
        header = job.header
        round_number, config = int(header["round"]), dict(header.get("config", {}))
        metrics: dict[str, float] = {}
        if config.pop("flops-evaluate-first", False):
            # Strategies such as q-FedAvg weigh an update by the global model's loss before training.
            metrics["train_loss"] = self._guest.evaluate(job.model_fd, round_number, config).loss
        result = self._guest.fit(job.model_fd, round_number, int(header["seed"]), config)
        digest = layout_digest(result.layout)
        answer = {
            "t": "result",
            "task": header["task"],
            "num_examples": result.num_examples,
            "metrics": {**metrics, **result.metrics},
            "fit_s": result.fit_s,
            "digest": digest,
        }
        offset = len(result.layout.file_header())
        if digest != self._digest:
            described = result.layout.to_header()
            answer["layout"] = described if len(described) <= 2 * len(self._layout.tensors) + 1000 else None
            return _Answer(job.key, answer)
        if self._layout.nbytes > wire.INLINE_BYTES:
            return _Answer(job.key, answer, update_fd=result.update_fd, update_offset=offset)
        return _Answer(job.key, answer, os.pread(result.update_fd, self._layout.nbytes, offset))

    def _evaluate(self, job: _Job) -> _Answer:
        header = job.header
        result = self._guest.evaluate(job.model_fd, int(header["round"]), dict(header.get("config", {})))
        return _Answer(
            job.key,
            {
                "t": "evaluated",
                "task": header["task"],
                "loss": result.loss,
                "accuracy": result.accuracy,
                "num_examples": result.num_examples,
                "metrics": dict(result.metrics),
            },
        )
