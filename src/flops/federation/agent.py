"""A learner's conversation with its aggregator: tasks in, answers out, for as long as the project lives.

It connects outward only, reconnects with jittered back-off, and keeps its last answer, so a task that is
asked again after a cut is answered without training again. The user's code runs in a worker process
(`flops.guest`); whatever happens there ends this learner's part with a clear error, never the agent's or
anyone else's.
"""

import logging
import mmap
import os
import random
import time
from pathlib import Path
from typing import Any

import pyarrow.flight as flight

from flops.core.errors import FlopsError
from flops.federation import wire
from flops.federation.blocks import Block, blocks
from flops.federation.config import AgentConfig
from flops.federation.model_file import ModelWriter, layout_digest
from flops.guest import Guest, GuestError
from flops_worker.tensors import Layout

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 5.0
_KEEPALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000)]


class _StopError(Exception):
    """The aggregator ended the project."""


class Agent:
    """One learner's conversation with its aggregator."""

    def __init__(self, config: AgentConfig, guest: Guest) -> None:
        self._config = config
        self._guest = guest
        self._loaded = False
        self._writer: Any = None
        self._reader: Any = None
        self._layout = Layout(())
        self._digest = ""
        self._blocks: tuple[Block, ...] = ()
        self._model: tuple[int, int] | None = None  # version, file descriptor
        self._answer: tuple[str, dict[str, Any]] | None = None  # task, header of the last answer
        self._update_fd: int | None = None
        self._update_offset = 0
        self._allows_metrics = True

    def run(self) -> None:
        """Take part until the project is over.

        Raises:
            GuestError: the user's code ended this learner's part; the aggregator has been told.
        """
        pause = _FIRST_PAUSE_S
        while True:
            client = None
            try:
                client = self._connect()
                pause = _FIRST_PAUSE_S
                self._converse()
            except _StopError as stop:
                log.info("the project is over: %s", stop)
                return
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
                raise FlopsError(f"the aggregator refused learner {self._config.learner}: {error}") from error
            except (flight.FlightError, StopIteration, wire.WireError, OSError) as error:
                log.info("the aggregator is away (%s), trying again", type(error).__name__)
                # Jitter, so that many learners do not return in one instant.
                time.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            finally:
                if client is not None:
                    self._reader.cancel()  # closing a client leaves its open calls open
                    client.close()

    def _connect(self) -> Any:
        tls = self._config.tls
        client = flight.FlightClient(
            self._config.aggregator,
            tls_root_certs=Path(tls.ca).read_bytes() if tls and tls.ca else None,
            generic_options=_KEEPALIVE,
        )
        try:
            options = flight.FlightCallOptions(
                headers=[(b"authorization", f"Bearer {self._config.token}".encode())]
            )
            descriptor = flight.FlightDescriptor.for_command(b"flops-federation-1")
            self._writer, self._reader = client.do_exchange(descriptor, options)
            self._writer.begin(wire.SCHEMA)
            wire.send(self._writer, {"t": "hello", "learner": self._config.learner})
            welcome = wire.receive(self._reader)
            self._layout = Layout.from_header(welcome.header.get("layout"))
        except BaseException:
            client.close()
            raise
        self._digest = layout_digest(self._layout)
        self._blocks = blocks(self._layout)
        self._forget_model()  # the aggregator sends what it thinks is missing to every new session
        return client

    def _converse(self) -> None:
        try:
            if not self._loaded:
                self._guest.load()
                self._guest.load_data()
                self._loaded = True
            wire.send(self._writer, {"t": "ready", "allows_metrics": self._allows_metrics})
            while True:
                self._answer_to(wire.receive(self._reader))
        except GuestError as error:
            message = {
                "t": "failed",
                "where": error.where,
                "message": str(error),
                "traceback": "\n".join(error.traceback),
            }
            wire.send(self._writer, message)
            self._writer.done_writing()
            self._drain()
            raise

    def _drain(self) -> None:
        """Read until the aggregator has taken notice and closes, so that the last word is not lost."""
        try:
            while wire.receive(self._reader).kind != "stop":
                pass
        except (flight.FlightError, StopIteration, wire.WireError):
            pass

    def _answer_to(self, message: wire.Received) -> None:
        header = message.header
        if message.kind == "stop":
            raise _StopError(str(header.get("reason", "")))
        if message.kind == "send":
            self._send_update(str(header["task"]))
            return
        if message.kind == "refused":
            log.warning("the aggregator refused our answer to %s: %s", header["task"], header["reason"])
            return
        if message.kind not in ("train", "evaluate"):
            raise wire.WireError(f"an unknown message '{message.kind[:40]}'")
        self._take_model(message)
        task = str(header["task"])
        if self._answer is None or self._answer[0] != task:
            answer = self._train(header) if message.kind == "train" else self._evaluate(header)
            self._answer = (task, answer)
        body = self._inline_update() if message.kind == "train" else None
        wire.send(self._writer, self._answer[1], body)

    def _take_model(self, message: wire.Received) -> None:
        """Keep the model that came along, in whatever form, as an anonymous file for the worker."""
        version = int(message.header["model"])
        if message.body is not None:
            writer = ModelWriter(self._layout)
            if len(message.body) != self._layout.nbytes:
                raise wire.WireError("a model does not fit its layout")
            writer.write(0, message.body)
        elif message.header.get("follows"):
            writer = ModelWriter(self._layout)
            for block in self._blocks:
                part = wire.receive(self._reader)
                if part.kind != "body" or part.body is None or part.header.get("offset") != block.offset:
                    raise wire.WireError("a model's bytes do not follow its layout")
                writer.write(block.offset, part.body)
        elif self._layout.nbytes == 0:
            writer = ModelWriter(self._layout)
        else:
            if self._model is None or self._model[0] != version:
                raise wire.WireError(f"model {version} was never sent")
            return
        self._forget_model()
        self._model = (version, writer.fd)

    def _forget_model(self) -> None:
        if self._model is not None:
            os.close(self._model[1])
            self._model = None

    def _train(self, header: dict[str, Any]) -> dict[str, Any]:
        assert self._model is not None
        round_number, config = int(header["round"]), dict(header.get("config", {}))
        metrics: dict[str, float] = {}
        if config.pop("flops-evaluate-first", False):
            # Strategies such as q-FedAvg weigh an update by the global model's loss before training.
            metrics["train_loss"] = self._guest.evaluate(self._model[1], round_number, config).loss
        result = self._guest.fit(self._model[1], round_number, int(header["seed"]), config)
        digest = layout_digest(result.layout)
        self._update_fd = result.update_fd
        self._update_offset = len(result.layout.file_header())
        answer = {
            "t": "result",
            "task": header["task"],
            "num_examples": result.num_examples,
            "metrics": {**metrics, **result.metrics},
            "fit_s": result.fit_s,
            "digest": digest,
        }
        if digest != self._digest:
            answer["layout"] = result.layout.to_header()
        return answer

    def _evaluate(self, header: dict[str, Any]) -> dict[str, Any]:
        assert self._model is not None
        config = dict(header.get("config", {}))
        result = self._guest.evaluate(self._model[1], int(header["round"]), config)
        return {
            "t": "evaluated",
            "task": header["task"],
            "loss": result.loss,
            "accuracy": result.accuracy,
            "num_examples": result.num_examples,
            "metrics": dict(result.metrics),
        }

    def _inline_update(self) -> memoryview | bytes | None:
        """A small update travels beside its announcement."""
        assert self._answer is not None
        assert self._update_fd is not None
        if self._answer[1]["digest"] != self._digest or self._layout.nbytes > wire.INLINE_BYTES:
            return None
        return os.pread(self._update_fd, self._layout.nbytes, self._update_offset)

    def _send_update(self, task: str) -> None:
        if self._answer is None or self._answer[0] != task or self._update_fd is None:
            return  # it is too late for this update: another task came since
        with mmap.mmap(self._update_fd, 0, access=mmap.ACCESS_READ) as mapping:
            body = memoryview(mapping)[self._update_offset :]
            try:
                wire.send_body(self._writer, task, self._blocks, body)
            finally:
                body.release()
