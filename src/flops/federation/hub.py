"""The hub: the aggregator's end of all its learners' exchanges.

One Arrow Flight server, one exchange a learner that stays open over all rounds. For each there is the
call's own thread, which reads, and one that writes: a learner that does not read can block nobody else, and
a learner that is gone is noticed at once. What learners say goes into one inbox that the round loop reads;
nothing polls. A learner that connects again replaces its former session, which from then on has no say.

No learner can make the aggregator hold more than it asked for: what waits to be sent is at most the latest
task, and a learner may say only as much as it was asked. (Not bounded here, for want of an option in
pyarrow's server: the size of one Flight message before it is parsed.)
"""

import hashlib
import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow.flight as flight

from flops.federation import wire
from flops.federation.blocks import Block
from flops.federation.config import Member, Tls
from flops.federation.model_file import ModelFile, layout_digest
from flops.federation.placement import COMMAND, Placement
from flops.federation.updates import RefusedError, SpooledBody
from flops.telemetry import current_request, current_span
from flops_worker.tensors import Layout

log = logging.getLogger(__name__)

_AUTH = "flops-auth"
_numbers = itertools.count(1)
_ANSWERS = frozenset({"ready", "result", "evaluated", "declined", "failed"})
_MAX_CALLS = 16
"""Open exchanges of one learner. One counts; others are left over from connections that broke unnoticed."""
_MAX_TURNS = 1000
"""How often a member may come and go within one exchange."""
_STOP_S = 2.0


@dataclass(frozen=True)
class GlobalModel:
    """One global model.

    ``number`` is another one for every model that this process sends, ``version`` counts the steps of the
    training. ``body`` keeps its file mapped for as long as a learner is still being sent it.
    """

    number: int
    version: int
    body: memoryview
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, version: int, file: ModelFile, blocks: tuple[Block, ...]) -> Self:
        """The next model of this process; its file may be closed by the caller."""
        return cls(next(_numbers), version, file.body, blocks)


@dataclass(frozen=True)
class Said:
    """Something a member said, or that happened to its session (``kind`` gone, uploaded).

    Without a learner it is nobody's word: it only ends the waiting for one.
    """

    learner: str
    kind: str
    header: Mapping[str, Any]
    body: bytes | None = None


class Session:
    """One learner's open exchange."""

    def __init__(self, learner: str, writer: Any) -> None:
        self.learner = learner
        self.ready = False
        self.allows_metrics = False
        self._writer = writer
        self._asked: tuple[str, int] | None = None
        self._model: int | None = None
        self._outbox: deque[tuple[dict[str, Any], GlobalModel | None]] = deque()
        self._closed = False
        self._failed = False
        self._upload: tuple[str, SpooledBody] | None = None
        self._answers_due = self._blocks_due = self._turns = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name=f"write-{learner}", daemon=True)
        self._thread.start()

    def send(self, header: dict[str, Any], model: GlobalModel | None = None) -> bool:
        """Queue a message; a task goes with its model, where the learner lacks it. Never blocks.

        Returns False for a task that this session was given already.
        """
        if model is not None and (request := current_request()):
            header = {**header, "request": request}
            if parent := current_span():
                header["span"] = parent
        with self._changed:
            if model is not None:
                if self._asked == (header["task"], model.number):
                    return False
                self._asked = (header["task"], model.number)
                # A learner that did not even read its last task need not hear of it any more.
                self._outbox = deque(item for item in self._outbox if item[1] is None)
            if not self._closed:
                self._outbox.append((header, model))
                self._changed.notify()
            return True

    def close(self, last: dict[str, Any] | None = None) -> None:
        """Stop writing after what is queued; with a last word, after that alone."""
        with self._changed:
            if last is not None and not self._closed:
                self._outbox.clear()
                self._outbox.append((last, None))
            self._closed = True
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def begin_upload(self, task: str, body: SpooledBody) -> None:
        with self._changed:
            self._upload = (task, body)
            self._blocks_due += body.num_blocks
        self.send({"t": "send", "task": task})

    def end_upload(self, body: SpooledBody | None = None) -> None:
        """Drop what still comes of an update: of this one, or of whichever is on its way."""
        with self._changed:
            if self._upload is not None and body in (None, self._upload[1]):
                self._upload = None

    def upload_of_block(self) -> tuple[str, SpooledBody] | None:
        """A block came: the upload under way, if it is still wanted.

        Raises:
            WireError: more blocks came than were ever asked for.
        """
        with self._changed:
            self._blocks_due -= 1
            if self._blocks_due < 0:
                raise wire.WireError("blocks came that nobody asked for")
            return self._upload

    def hear(self, kind: str) -> None:
        """Note that the learner says something.

        Raises:
            WireError: it has said all that it may say by now.
        """
        with self._changed:
            if kind in ("ready", "unready"):
                self._turns += 1
                too_much = self._turns > _MAX_TURNS or (kind == "ready" and self.ready)
                self.ready = kind == "ready"
            elif kind == "failed":
                too_much, self._failed = self._failed, True
            else:
                self._answers_due -= 1
                too_much = self._answers_due < 0
        if too_much:
            raise wire.WireError(f"it says '{kind}' more often than it was asked")

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._outbox or self._closed)
                    if not self._outbox:
                        return
                    header, model = self._outbox.popleft()
                    self._answers_due += model is not None
                if model is None:
                    wire.send(self._writer, header)
                else:
                    self._write_with_model(header, model)
        except (flight.FlightError, OSError):
            pass  # the reading thread notices and reports it
        except Exception:
            log.exception("writing to learner %s failed", self.learner)

    def _write_with_model(self, header: dict[str, Any], model: GlobalModel) -> None:
        header = {**header, "model": model.number}
        if self._model == model.number:
            wire.send(self._writer, header)
            return
        body = model.body
        if len(body) <= wire.INLINE_BYTES:
            wire.send(self._writer, header, body)
        else:
            wire.send(self._writer, {**header, "follows": True})
            wire.send_body(self._writer, str(header["task"]), model.blocks, body)
        self._model = model.number


class Hub:
    """All sessions, and the inbox of what learners say."""

    def __init__(self, project: str, layout: Layout, members: Mapping[str, Member]) -> None:
        self.inbox: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self.members = members
        self._project = project
        self._max_header_bytes = wire.MAX_ANSWER_BYTES + 2 * len(layout.file_header())
        self._welcome = {
            "t": "welcome",
            "project": project,
            "layout": layout.to_header(),
            "digest": layout_digest(layout),
        }
        # Guards the sessions and, so that what a session says cannot overtake its end, what enters the inbox.
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._calls: Counter[str] = Counter()
        self._ejected: dict[str, dict[str, Any]] = {}
        self._over: dict[str, Any] | None = None

    def session(self, learner: str) -> Session | None:
        with self._lock:
            return self._sessions.get(learner)

    def ready(self) -> list[str]:
        """The learners that are connected and have loaded their data, in no order."""
        with self._lock:
            return [name for name, session in self._sessions.items() if session.ready]

    def send(self, learner: str, header: dict[str, Any], model: GlobalModel | None = None) -> bool:
        """Queue a message to a learner; False when it is not connected, or has been given this task."""
        session = self.session(learner)
        return session is not None and session.send(header, model)

    def begin_upload(self, learner: str, task: str, body: SpooledBody) -> bool:
        """Ask a learner for its update, which goes to ``body``; False when it is not connected."""
        session = self.session(learner)
        if session is None:
            return False
        session.begin_upload(task, body)
        return True

    def end_upload(self, learner: str) -> None:
        """Whatever still comes of a learner's update is dropped."""
        session = self.session(learner)
        if session is not None:
            session.end_upload()

    def eject(self, learner: str, reason: str) -> None:
        """End a learner's part for good: it is told to stop, now and whenever it comes back."""
        last = {"t": "stop", "reason": f"this learner was ejected: {reason}"}
        with self._lock:
            self._ejected[learner] = last
            session = self._sessions.pop(learner, None)
        if session is not None:
            session.close(last)

    def wake(self) -> None:
        """End the waiting of whoever reads the inbox."""
        self.inbox.put(Said("", "wake", {}))

    def stop_all(self, reason: str) -> None:
        """Tell every learner that the project is over, those that come later too; their agents end then."""
        with self._lock:
            self._over = {"t": "stop", "reason": reason}
            sessions = list(self._sessions.values())
        for session in sessions:
            session.close(self._over)
        deadline = time.monotonic() + _STOP_S
        for session in sessions:
            session.join(max(0.0, deadline - time.monotonic()))

    def serve(self, learner: str, reader: Any, writer: Any) -> None:
        """Carry one exchange from its first message to its end (runs in the call's own thread)."""
        with self._lock:
            if self._calls[learner] >= _MAX_CALLS:
                raise flight.FlightUnavailableError("too many exchanges of this learner are open")
            self._calls[learner] += 1
        session = None
        reason, broke_protocol = "it left", False
        try:
            writer.begin(wire.SCHEMA)
            session = Session(learner, writer)
            hello = wire.receive(reader, self._max_header_bytes)
            if hello.kind != "hello" or hello.header.get("learner") != learner:
                raise wire.WireError("the first message is not this learner's hello")
            if self._enter(session):
                while self.session(learner) is session:
                    self.dispatch(session, wire.receive(reader, self._max_header_bytes))
        except StopIteration:
            pass
        except (flight.FlightError, OSError) as error:
            reason = f"the connection was lost ({_first_line(error)})"
        except wire.WireError as error:
            reason, broke_protocol = f"it does not keep to the protocol: {error}", True
            log.warning("learner %s of %s: %s", learner, self._project, reason)
        finally:
            with self._lock:
                if self._sessions.get(learner) is session and session is not None:
                    del self._sessions[learner]
                    self.inbox.put(Said(learner, "gone", {"reason": reason, "protocol": broke_protocol}))
            if session is not None:
                session.close()
                # Without limit: a write under way must not outlive its call, pyarrow would write to freed
                # memory. It ends with the connection at the latest.
                session.join()
            with self._lock:
                self._calls[learner] -= 1

    def _enter(self, session: Session) -> bool:
        """Make a session its learner's only one; False when the project is over."""
        learner = session.learner
        with self._lock:
            last = self._over or self._ejected.get(learner)
            if last is not None:
                session.close(last)
                return False
            session.send(self._welcome)  # before anything else can be sent to it
            former = self._sessions.get(learner)
            self._sessions[learner] = session
            if former is not None:
                self.inbox.put(Said(learner, "gone", {"reason": "it connected again"}))
        if former is not None:
            former.close({"t": "stop", "reason": "another agent of this learner has taken its place"})
        return True

    def _put(self, session: Session, said: Said) -> None:
        with self._lock:
            if self._sessions.get(session.learner) is session:
                self.inbox.put(said)

    def dispatch(self, session: Session, message: wire.Received) -> None:
        """Take one message of a session.

        Raises:
            WireError: it does not belong here; the session has to end.
        """
        learner, kind = session.learner, message.kind
        if kind == "beat":
            return
        if kind == "body":
            self._receive_body(session, message)
        elif kind in _ANSWERS or (kind == "unready" and self.members[learner].kind == "cluster"):
            if message.body is not None and len(message.body) > wire.INLINE_BYTES:
                raise wire.WireError(f"{len(message.body)} bytes came unasked")
            if kind == "ready":
                session.allows_metrics = message.header.get("allows_metrics") is True
            session.hear(kind)
            body = bytes(message.body) if message.body is not None else None
            self._put(session, Said(learner, kind, message.header, body))
        else:
            raise wire.WireError(f"an unknown message '{kind[:40]}'")

    def _receive_body(self, session: Session, message: wire.Received) -> None:
        upload = session.upload_of_block()
        if upload is None or message.header.get("task") != upload[0]:
            return  # its upload was refused while it was on its way
        task, body = upload
        ours = False
        try:
            body.receive(message.header.get("offset"), message.body)
        except RefusedError as error:
            reason = str(error)
        except OSError as error:
            reason, ours = f"the aggregator cannot store it: {error.strerror}", True
        else:
            if body.complete:
                session.end_upload(body)
                self._put(session, Said(session.learner, "uploaded", {"task": task}))
            return
        session.end_upload(body)
        self._put(
            session, Said(session.learner, "upload-refused", {"task": task, "reason": reason, "ours": ours})
        )


class Server(flight.FlightServerBase):  # type: ignore[misc]
    """The Flight server around a hub: it authenticates, and knows exchanges only."""

    def __init__(
        self,
        listen: str,
        hub: Hub,
        tls: Tls | None = None,
        placement: Placement | None = None,
        newcomers: Mapping[str, Member] | None = None,
    ) -> None:
        """Args: newcomers may ask for their placement, and for nothing else."""
        if listen.startswith("grpc+unix://"):
            Path(listen.removeprefix("grpc+unix://")).unlink(missing_ok=True)
        certificates = None
        if tls is not None and tls.cert and tls.key:
            certificates = [(Path(tls.cert).read_bytes(), Path(tls.key).read_bytes())]
        self._hub, self._placement = hub, placement
        authority = Path(tls.ca).read_bytes() if certificates is not None and tls and tls.ca else None
        super().__init__(
            location=listen,
            tls_certificates=certificates,
            verify_client=authority is not None,
            root_certificates=authority,
            middleware={_AUTH: _Authenticate({**hub.members, **(newcomers or {})})},
        )

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        member = context.get_middleware(_AUTH).learner
        if self._placement is not None and descriptor.command == COMMAND:
            self._placement.serve(member, reader, writer)
        elif member in self._hub.members:
            self._hub.serve(member, reader, writer)
        else:
            raise flight.FlightUnauthorizedError(f"{member} takes part in a cluster, not here")


class _Identity(flight.ServerMiddleware):  # type: ignore[misc]
    """Who is calling, as its token proves."""

    def __init__(self, learner: str) -> None:
        self.learner = learner


class _Authenticate(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Turns a bearer token into a learner. Looked up by hash, so timing tells nothing about a token."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._learners = {_hash(member.token): learner for learner, member in members.items()}

    def start_call(self, info: Any, headers: Mapping[str, list[str]]) -> _Identity:
        values = headers.get("authorization") or [""]
        learner = self._learners.get(_hash(values[0].removeprefix("Bearer ")))
        if learner is None:
            raise flight.FlightUnauthenticatedError("the token belongs to no learner of this project")
        return _Identity(learner)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].split(". Detail:", 1)[0][:200]
