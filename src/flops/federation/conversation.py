"""A member's conversation with its aggregator: tasks in, answers out, for as long as the project lives.

A member is a learner or a cluster of them. Two threads share a conversation. One keeps the connection
(`Conversation.run`): it connects outward only, reconnects with jittered back-off while the work goes on, for
hours if it has to, and notices at once that the project is over. The other works: it takes one task at a
time (`Conversation.next_task`) and answers it. The last answer is kept, so a task that is asked again after
a cut is answered without being done again. Whatever happens in the work ends this member's part with a clear
error, never anyone else's.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.flight as flight

from flops.core.errors import FailedError, FlopsError
from flops.federation import placement, wire
from flops.federation.blocks import Block, blocks
from flops.federation.channels import Channels
from flops.federation.config import Link
from flops.federation.kept_models import KeptModels, written
from flops.federation.model_file import ModelWriter, layout_digest
from flops.federation.tally import Tally
from flops.telemetry import is_request, trace_of
from flops_worker.tensors import Layout, LayoutError

log = logging.getLogger(__name__)

_BORN = time.monotonic()

_FIRST_PAUSE_S = 0.02
_QUICK_S = 10.0
_QUICK_PAUSE_S = 0.3
_LONGEST_PAUSE_S = 30.0
# An aggregator that was killed is back within seconds: look often. One that stays away is asked rarely, so
# that a thousand members do not keep a struggling machine busy.
_BEAT_S = 20.0
_LOST = (flight.FlightError, OSError)


class _StopError(Exception):
    """The aggregator ended the project."""


@dataclass(frozen=True)
class Task:
    """One thing the aggregator wants done.

    ``model_fd`` is an open model file of ``layout`` that belongs to whoever took the task; it is closed by
    `Conversation.answer`.
    ``version`` counts the steps of the global model.
    """

    key: tuple[str, int]
    kind: str
    round: int
    seed: int
    version: int
    config: Mapping[str, Any]
    layout: Layout
    model_fd: int
    request: str = ""
    """Id of the request that it is done for; empty: nobody's."""
    parent: str = ""
    """The aggregator's span (W3C) that it belongs to; empty: none is recorded."""
    came: float = 0.0
    """When it had come, its model included; seconds since 1970."""

    @property
    def name(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Trained:
    """The answer to ``train``: an update, in an open file that stays as it is until the next task is taken.

    ``layout`` is that of the file's body, which begins at its byte ``offset``.
    """

    num_examples: int
    layout: Layout
    update_fd: int
    offset: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    fit_s: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """The answer to ``evaluate``."""

    loss: float
    accuracy: float
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Declined:
    """The task cannot be done this time; another one perhaps can."""

    reason: str


@dataclass(frozen=True)
class _Answer:
    """The last answer, and the update that goes with it: small ones beside it, others from their file."""

    key: tuple[str, int]
    header: dict[str, Any]
    body: bytes | None = None
    update_fd: int = -1
    update_offset: int = 0
    blocks: tuple[Block, ...] = ()


class Conversation:
    """One member's conversation with its aggregator.

    Args:
        on_task: called, from the thread that keeps the connection, whenever a task has come; returns at once.
        expected: the layout that updates have, made from the model's; default: the model's own.
        check_layout: raises FailedError for a model that is not the member's.
        models, channels: shared with other members of this process.
        tally: counts what this member does and sends.
    """

    def __init__(
        self,
        link: Link,
        *,
        allows_metrics: bool = True,
        on_task: Callable[[], None] = lambda: None,
        expected: Callable[[Layout], Layout] = lambda layout: layout,
        check_layout: Callable[[Layout], None] = lambda layout: None,
        models: KeptModels | None = None,
        channels: Channels | None = None,
        tally: Tally | None = None,
    ) -> None:
        self._link = link
        self._tally = tally
        self._allows_metrics = allows_metrics
        self._on_task = on_task
        self._expected, self._check_layout = expected, check_layout
        self._models = models
        self._channels = channels or Channels()
        # Of the thread that keeps the connection:
        self._address = None if link.placed else link.aggregator
        self._reader: Any = None
        self._layout = Layout(())
        self._blocks: tuple[Block, ...] = ()
        self._update_layout, self._update_digest = Layout(()), ""
        self._update_blocks: tuple[Block, ...] = ()
        self._model: tuple[int, int] | None = None  # number, file descriptor
        self._connections = 0
        self._pause_s = _FIRST_PAUSE_S
        self._lost_since: float | None = None
        # Of both, under the lock, which also keeps their messages apart:
        self._changed = threading.Condition()
        self._writer: Any = None
        self._present = False
        self._absent_reason = ""
        self._start_s: float | None = None
        self._asked: tuple[str, int] | None = None
        self._pending: Task | None = None
        self._working_on: tuple[str, int] | None = None
        self._answer: _Answer | None = None
        self._failure: FlopsError | None = None
        self._failed: dict[str, Any] = {}
        self._over = False

    def run(self) -> None:
        """Keep the connection until the project is over.

        Raises:
            FlopsError: this member's part has failed, and the aggregator was told; or it was refused.
        """
        try:
            self._run()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            client, lost = None, False
            try:
                client = self._connect()
                self._converse()
            except _StopError as stop:
                if self._failure is not None:
                    raise self._failure from None
                log.info("the project is over: %s", stop)
                return
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
                raise FlopsError(f"the aggregator refused {self._link.member}: {error}") from error
            except StopIteration:
                if self._failure is not None:
                    raise self._failure from None
                lost = True
                reason = "it closed the connection"
            except (*_LOST, wire.WireError) as error:
                lost = True
                reason = type(error).__name__
            finally:
                with self._changed:
                    self._writer = None
                if client is not None:
                    self._reader.cancel()  # giving a client back leaves its open calls open
                    self._channels.give_back(client, lost=lost)
            self._wait(reason)

    # -- the working side

    def present(self) -> None:
        """From now on tasks may come."""
        with self._changed:
            if not self._present:
                self._present = True
                if self._start_s is None:
                    self._start_s = round(time.monotonic() - _BORN, 3)
                self._say_ready()

    def absent(self, reason: str, *, news: bool = False) -> None:
        """No task should come until this member is present again.

        Args:
            news: tell this reason although an earlier one was told.
        """
        with self._changed:
            news = news or self._present or not self._absent_reason
            self._present, self._absent_reason = False, reason
            if news:
                self._say({"t": "unready", "reason": reason})

    def next_task(self, timeout_s: float | None = None) -> Task | None:
        """Wait for the next task, and take it; None when none came in time, or the project is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending is not None or self._over, timeout_s)
            task, self._pending = self._pending, None
            if task is None or self._over:
                return None
            self._working_on = task.key
            self._answer = None  # the next update is written where the last one is
            return task

    @property
    def over(self) -> bool:
        """Whether `run` has returned: nothing more will be asked."""
        with self._changed:
            return self._over

    @property
    def has_newer_task(self) -> bool:
        """Whether the task that was taken last is no longer wanted: another one waits."""
        with self._changed:
            return self._pending is not None or self._over

    def answer(self, task: Task, result: Trained | Evaluated | Declined) -> None:
        """Answer a task that was taken."""
        try:
            answer = self._answer_of(task, result)
        finally:
            os.close(task.model_fd)
        if self._tally is not None and not isinstance(result, Declined):
            (self._tally.trained if isinstance(result, Trained) else self._tally.evaluated)()
        with self._changed:
            # What was declined may be possible when it is asked for again.
            self._answer, self._working_on = None if isinstance(result, Declined) else answer, None
            if self._asked == task.key:
                self._say(answer.header, answer.body)

    def give_up(self, task: Task) -> None:
        """A task that was taken is not done: something newer came.

        Where it is the one that is wanted again by now, `next_task` gives it once more.
        """
        with self._changed:
            self._working_on = None
            if self._asked == task.key and self._pending is None and not self._over:
                self._pending = task
            else:
                os.close(task.model_fd)

    def fail(self, error: FlopsError, where: str = "", traceback: str = "") -> None:
        """This member's part ends: the aggregator is told, and answers by ending the conversation."""
        with self._changed:
            self._failure = error
            self._failed = {"t": "failed", "where": where, "message": str(error), "traceback": traceback}
            self._say(self._failed)

    def beat(self) -> None:
        """Show that a busy member lives; `keep_beating` does it."""
        with self._changed:
            self._say({"t": "beat"})

    def _answer_of(self, task: Task, result: Trained | Evaluated | Declined) -> _Answer:
        if isinstance(result, Declined):
            return _Answer(task.key, {"t": "declined", "task": task.name, "reason": result.reason[:2000]})
        if isinstance(result, Evaluated):
            return _Answer(task.key, {"t": "evaluated", "task": task.name, **vars(result)})
        digest = layout_digest(result.layout)
        header: dict[str, Any] = {
            "t": "result",
            "task": task.name,
            "version": task.version,
            "num_examples": result.num_examples,
            "metrics": dict(result.metrics),
            "fit_s": result.fit_s,
            "digest": digest,
        }
        expected = self._update_layout
        if digest != self._update_digest:
            described = result.layout.to_header()
            header["layout"] = described if len(described) <= 2 * len(expected.tensors) + 1000 else None
            return _Answer(task.key, header)
        if expected.nbytes > wire.INLINE_BYTES:
            return _Answer(
                task.key,
                header,
                update_fd=result.update_fd,
                update_offset=result.offset,
                blocks=self._update_blocks,
            )
        return _Answer(task.key, header, os.pread(result.update_fd, expected.nbytes, result.offset))

    # -- the side that keeps the connection

    def _wait(self, reason: str) -> None:
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            log.info("the aggregator is away (%s), trying again", reason)
        longest_s = _QUICK_PAUSE_S if now - self._lost_since < _QUICK_S else _LONGEST_PAUSE_S
        self._pause_s = min(2 * self._pause_s, longest_s)
        # Jitter, so that many members do not return in one instant.
        time.sleep(self._pause_s * random.uniform(0.5, 1.5))  # noqa: S311

    def ask_for_members(self) -> list[str]:
        """Of a cluster whose parent places learners: wait for its decision, and hear who is here.

        Raises:
            FlopsError: the parent refuses this cluster.
        """
        while True:
            try:
                return [str(name) for name in self._ask_for_place()["members"]]
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
                raise FlopsError(f"the aggregator refused {self._link.member}: {error}") from error
            except (*_LOST, wire.WireError, StopIteration) as error:
                self._wait(type(error).__name__)

    def _ask_for_place(self) -> Mapping[str, Any]:
        client = self._channels.take(self._link.aggregator, self._link.tls)
        lost = True
        try:
            answer = placement.ask(client, self._options())
            lost = False
        finally:
            self._channels.give_back(client, lost=lost)
        return answer

    def _options(self) -> Any:
        return flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {self._link.token}".encode())])

    def _find_place(self) -> str:
        """Where to connect; asked for once, where the aggregator places its learners."""
        if self._address is None:
            self._address = str(self._ask_for_place()["aggregator"])
        return self._address

    def _connect(self) -> Any:
        client = self._channels.take(self._find_place(), self._link.tls)
        self._reader = None
        try:
            descriptor = flight.FlightDescriptor.for_command(b"flops-federation-1")
            writer, self._reader = client.do_exchange(descriptor, self._options())
            writer.begin(wire.SCHEMA)
            self._send(writer, {"t": "hello", "learner": self._link.member})
            welcome = self._receive()
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
            self._channels.give_back(client, lost=True)
            raise
        return client

    def _enter(self, writer: Any, layout: Layout) -> None:
        """Begin a session: forget what belonged to the last one, and say how far we are."""
        try:
            self._check_layout(layout)
        except FailedError as error:
            self.fail(error)
        self._forget_model()  # the aggregator sends what it thinks is missing to every new session
        self._connections += 1
        with self._changed:
            self._writer = writer
            self._layout, self._blocks = layout, blocks(layout)
            self._update_layout = expected = self._expected(layout)
            self._update_digest, self._update_blocks = layout_digest(expected), blocks(expected)
            self._asked = None
            if self._failure is not None:
                self._say(self._failed)
            elif self._present:
                self._say_ready()
            elif self._absent_reason:
                self._say({"t": "unready", "reason": self._absent_reason})

    def _send(self, writer: Any, header: dict[str, Any], body: bytes | None = None) -> None:
        size_bytes = wire.send(writer, header, body)
        if self._tally is not None:
            self._tally.sent(size_bytes)

    def _receive(self) -> wire.Received:
        message = wire.receive(self._reader)
        if self._tally is not None:
            self._tally.received(message.size_bytes)
        return message

    def _converse(self) -> None:
        while True:
            message = self._receive()
            self._pause_s, self._lost_since = _FIRST_PAUSE_S, None
            try:
                self._hear(message)
            except (KeyError, TypeError, ValueError) as error:
                raise wire.WireError(f"a message cannot be read: {error!r}") from error
            del message  # what came beside it is not held until the next one comes

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
        header = message.header
        # Training a round twice gives the same. A model to evaluate is not committed yet, and may be another
        # one when the aggregator was killed and has come back.
        life = 0 if message.kind == "train" else self._connections
        key = (str(header["task"]), life)
        with self._changed:
            self._asked = key
            self._drop_pending()
            if self._answer is not None and self._answer.key == key:
                self._say(self._answer.header, self._answer.body)
            elif self._working_on != key:
                self._pending = Task(
                    key,
                    message.kind,
                    round=int(header["round"]),
                    seed=int(header["seed"]),
                    version=int(header["version"]),
                    config=dict(header.get("config", {})),
                    layout=self._layout,
                    model_fd=os.dup(self._model[1]),
                    request=_request(header),
                    parent=_parent(header),
                    came=time.time(),
                )
                self._changed.notify_all()
        self._on_task()

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
        fd = self._receive_model() if follows else self._model_beside(message.body or b"")
        self._forget_model()
        self._model = (version, fd)

    def _receive_model(self) -> int:
        writer = ModelWriter(self._layout)
        try:
            for block in self._blocks:
                part = self._receive()
                if part.kind != "body" or part.body is None or part.header.get("offset") != block.offset:
                    raise wire.WireError("a model's bytes do not follow its layout")
                writer.write(block.offset, part.body)
        except BaseException:
            writer.discard()
            raise
        return writer.fd if self._models is None else self._models.of_file(writer.fd)

    def _model_beside(self, body: bytes | memoryview) -> int:
        if len(body) != self._layout.nbytes:
            raise wire.WireError("a model does not fit its layout")
        return (
            written(self._layout, body) if self._models is None else self._models.of_body(self._layout, body)
        )

    def _forget_model(self) -> None:
        if self._model is not None:
            os.close(self._model[1])
            self._model = None

    def _send_update(self, task: str) -> None:
        with self._changed:
            answer = self._answer
        if answer is None or answer.header["task"] != task or answer.update_fd < 0:
            return  # it is too late for this update: another task came since
        for block in answer.blocks:
            # Not mapped: user code holds this file too, and cutting it short under a mapping would kill us.
            data = os.pread(answer.update_fd, block.nbytes, answer.update_offset + block.offset)
            if len(data) != block.nbytes:
                self.fail(
                    FailedError("fit_model of the repository changed its update after it had returned it")
                )
                return
            with self._changed:
                self._send(self._writer, {"t": "body", "task": task, "offset": block.offset}, data)

    def _say(self, header: dict[str, Any], body: bytes | None = None) -> None:
        """Send a message if there is a connection; `_enter` and tasks that are asked again repeat it."""
        try:
            if self._writer is not None:
                self._send(self._writer, header, body)
        except _LOST:
            log.info("the connection is lost")  # the thread that reads it connects again

    def _say_ready(self) -> None:
        self._say({"t": "ready", "allows_metrics": self._allows_metrics, "start_s": self._start_s})


def _request(header: Mapping[str, Any]) -> str:
    """Who is behind a task: what an aggregator says goes into log lines."""
    request = header.get("request")
    return request if isinstance(request, str) and is_request(request) else ""


def _parent(header: Mapping[str, Any]) -> str:
    parent = header.get("span")
    return parent if isinstance(parent, str) and trace_of(parent) else ""


def keep_beating(conversations: list[Conversation]) -> None:
    """Let members show that they live, for ever; run it in a thread of its own."""
    while True:
        time.sleep(_BEAT_S)
        for conversation in conversations:
            conversation.beat()
