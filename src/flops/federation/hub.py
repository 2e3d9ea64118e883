"""The hub: the aggregator's end of all its learners' exchanges.

One Arrow Flight server, one exchange a learner that stays open over all rounds. For each there is the
call's own thread, which reads, and one that writes: a learner that does not read can block nobody else, and
a learner that is gone is noticed at once. What learners say goes into one inbox that the round loop reads;
nothing polls. A learner that connects again replaces its former session.
"""

import contextlib
import hashlib
import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.flight as flight

from flops.federation import wire
from flops.federation.blocks import Block
from flops.federation.config import Member, Tls
from flops.federation.model_file import ModelFile, layout_digest
from flops.federation.updates import RefusedError, SpooledBody
from flops_worker.tensors import Layout

log = logging.getLogger(__name__)

_AUTH = "flops-auth"


@dataclass(frozen=True)
class GlobalModel:
    """One version of the global model: the parameters after ``version`` rounds."""

    version: int
    file: ModelFile
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Said:
    """Something a learner said, or that happened to its session (``kind`` connected, gone, uploaded)."""

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
        self.upload: tuple[str, SpooledBody] | None = None
        self._writer = writer
        self._outbox: queue.SimpleQueue[tuple[dict[str, Any], GlobalModel | None] | None] = (
            queue.SimpleQueue()
        )
        self._version: int | None = None
        self._thread = threading.Thread(target=self._write, name=f"write-{learner}", daemon=True)
        self._thread.start()

    def send(self, header: dict[str, Any], model: GlobalModel | None = None) -> None:
        """Queue a message; the model goes along where the learner does not have it yet. Never blocks."""
        self._outbox.put((header, model))

    def close(self) -> None:
        """Stop writing after what is queued."""
        self._outbox.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _write(self) -> None:
        with contextlib.suppress(flight.FlightError, OSError):  # the reading thread notices and reports it
            while (item := self._outbox.get()) is not None:
                header, model = item
                if model is None:
                    wire.send(self._writer, header)
                else:
                    self._write_with_model(header, model)

    def _write_with_model(self, header: dict[str, Any], model: GlobalModel) -> None:
        header = {**header, "model": model.version}
        if self._version == model.version:
            wire.send(self._writer, header)
            return
        body = model.file.body
        if len(body) <= wire.INLINE_BYTES:
            wire.send(self._writer, header, body)
        else:
            wire.send(self._writer, {**header, "follows": True})
            wire.send_body(self._writer, str(header["task"]), model.blocks, body)
        self._version = model.version


class Hub:
    """All sessions, and the inbox of what learners say."""

    def __init__(self, project: str, layout: Layout, members: Mapping[str, Member]) -> None:
        self.inbox: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self.members = members
        self._project = project
        self._layout = layout
        self._welcome = {
            "t": "welcome",
            "project": project,
            "layout": layout.to_header(),
            "digest": layout_digest(layout),
        }
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def session(self, learner: str) -> Session | None:
        with self._lock:
            return self._sessions.get(learner)

    def ready(self) -> list[str]:
        """The learners that are connected and have loaded their data, in slot order."""
        with self._lock:
            return sorted(name for name, session in self._sessions.items() if session.ready)

    def send(self, learner: str, header: dict[str, Any], model: GlobalModel | None = None) -> bool:
        """Queue a message to a learner; False when it is not connected."""
        session = self.session(learner)
        if session is None:
            return False
        session.send(header, model)
        return True

    def begin_upload(self, learner: str, task: str, body: SpooledBody) -> bool:
        """Ask a learner for its update, which goes to ``body``; False when it is not connected."""
        session = self.session(learner)
        if session is None:
            return False
        session.upload = (task, body)
        session.send({"t": "send", "task": task})
        return True

    def end_upload(self, learner: str) -> None:
        """Whatever still comes of a learner's update is dropped."""
        session = self.session(learner)
        if session is not None:
            session.upload = None

    def stop_all(self, reason: str) -> None:
        """Tell every learner that the project is over; their agents end by themselves."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.send({"t": "stop", "reason": reason})
            session.close()
        for session in sessions:
            session.join(1.0)

    def serve(self, learner: str, reader: Any, writer: Any) -> None:
        """Carry one exchange from its first message to its end (runs in the call's own thread)."""
        writer.begin(wire.SCHEMA)
        session = Session(learner, writer)
        reason = "it left"
        try:
            hello = wire.receive(reader)
            if hello.kind != "hello" or hello.header.get("learner") != learner:
                raise wire.WireError("the first message is not this learner's hello")
            session.send(self._welcome)
            with self._lock:
                self._sessions[learner] = session
            while True:
                self._dispatch(session, wire.receive(reader))
        except StopIteration:
            pass
        except flight.FlightError as error:
            reason = f"the connection was lost ({_first_line(error)})"
        except wire.WireError as error:
            reason = f"it does not keep to the protocol: {error}"
            log.warning("learner %s of %s: %s", learner, self._project, reason)
        finally:
            session.close()
            with self._lock:
                current = self._sessions.get(learner) is session
                if current:
                    del self._sessions[learner]
            if current:
                self.inbox.put(Said(learner, "gone", {"reason": reason}))
            session.join(1.0)

    def _dispatch(self, session: Session, message: wire.Received) -> None:
        if message.kind == "body":
            self._receive_body(session, message)
        elif message.kind == "ready":
            session.allows_metrics = message.header.get("allows_metrics") is True
            session.ready = True
            self.inbox.put(Said(session.learner, "ready", message.header))
        elif message.kind in ("result", "evaluated", "failed"):
            body = bytes(message.body) if message.body is not None else None
            if body is not None and len(body) > wire.INLINE_BYTES:
                raise wire.WireError(f"{len(body)} bytes came unasked")
            self.inbox.put(Said(session.learner, message.kind, message.header, body))
        else:
            raise wire.WireError(f"an unknown message '{message.kind[:40]}'")

    def _receive_body(self, session: Session, message: wire.Received) -> None:
        if session.upload is None:
            return  # its upload was refused while it was on its way
        task, body = session.upload
        if message.header.get("task") != task:
            return
        try:
            body.receive(message.header.get("offset"), message.body)
        except RefusedError as error:
            session.upload = None
            self.inbox.put(Said(session.learner, "upload-refused", {"task": task, "reason": str(error)}))
        else:
            if body.complete:
                session.upload = None
                self.inbox.put(Said(session.learner, "uploaded", {"task": task}))


class Server(flight.FlightServerBase):  # type: ignore[misc]
    """The Flight server around a hub: it authenticates, and knows exchanges only."""

    def __init__(self, listen: str, hub: Hub, tls: Tls | None = None) -> None:
        if listen.startswith("grpc+unix://"):
            Path(listen.removeprefix("grpc+unix://")).unlink(missing_ok=True)
        certificates = None
        if tls is not None and tls.cert and tls.key:
            certificates = [(Path(tls.cert).read_bytes(), Path(tls.key).read_bytes())]
        self._hub = hub
        super().__init__(
            location=listen,
            tls_certificates=certificates,
            middleware={_AUTH: _Authenticate(hub.members)},
        )

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._hub.serve(context.get_middleware(_AUTH).learner, reader, writer)


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
