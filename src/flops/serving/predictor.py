"""One predictor: a process that holds the model, and answers one batch of questions at a time."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from flops.core.errors import UnavailableError
from flops.guest.process import Process
from flops.guest.room import Room
from flops.serving.errors import ModelFailedError, RefusedError
from flops.serving.exchange import BrokenAnswerError, Exchange
from flops.serving.question import Answer, Question
from flops_worker import channel

log = logging.getLogger(__name__)

MODULE = "flops_worker.predictor"
_LENGTH = 4
_SHOWN = 500
_DEATH_S = 2.0
_LOG_LINES = 8


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    """How predictors are started; the words of `ServingConfig`."""

    model: Path
    python: Path
    kind: str
    threads: int | None
    memory_mb: int | None
    isolate: bool
    log: Path | None
    load_timeout_s: float


class PredictorDiedError(Exception):
    """The process ended, or does not keep to the protocol; the text says how."""


class PredictorHangsError(Exception):
    """No answer in time."""


class Predictor:
    """Use it from one event loop; `ask` is not to be called while another `ask` is under way."""

    def __init__(self, process: Process, exchange: Exchange) -> None:
        self._process = process
        self._exchange = exchange
        self._line: _Line | None = None
        self.about: dict[str, Any] = {}
        self.answered = 0
        """Batches, so far."""

    @classmethod
    async def start(cls, settings: PredictorSettings) -> "Predictor":
        """Start the process and load the model.

        Raises:
            FlopsError: the environment cannot be used, or the model cannot be loaded.
            PredictorDiedError, PredictorHangsError: the process ended meanwhile, or takes too long.
        """
        starting = asyncio.ensure_future(asyncio.to_thread(cls._launch, settings))
        try:
            predictor = await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await (await starting).close()
            raise
        try:
            await predictor._load(settings)
        except BaseException:
            await predictor.close()
            raise
        return predictor

    @classmethod
    def _launch(cls, settings: PredictorSettings) -> "Predictor":
        exchange = Exchange()
        try:
            process = Process(
                Room(settings.python, settings.model),
                log=settings.log,
                isolate=settings.isolate,
                threads=settings.threads,
                memory_mb=settings.memory_mb,
                module=MODULE,
            )
        except BaseException as error:
            exchange.close()
            if isinstance(error, OSError):
                raise UnavailableError(f"the predictor cannot be started: {error}") from error
            raise
        return cls(process, exchange)

    async def _load(self, settings: PredictorSettings) -> None:
        if settings.isolate and not self._process.isolation.network_cut:
            log.info("the model's network is not cut: %s", self._process.isolation.reason)
        sock = self._process.channel
        files = (self._exchange.questions, self._exchange.answers)
        try:
            channel.send(sock, {"op": "load", "kind": settings.kind}, files)
        except channel.ChannelClosed as error:
            raise PredictorDiedError(self._last_words()) from error
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, self._line = await loop.create_unix_connection(_Line, sock=sock)
        answer = await self._answer(settings.load_timeout_s)
        if answer.get("ok") is not True:
            raise ModelFailedError(
                f"the model in '{settings.model}' cannot be loaded: {_said(answer)}"
                " - its environment must have what its requirements.txt names"
            )
        about = answer.get("about")
        self.about = about if isinstance(about, dict) else {}

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, batch: Sequence[Question], timeout_s: float) -> tuple[Answer, float]:
        """The model's answer to questions of one key, and the seconds it took.

        Raises:
            RefusedError: the model's own MLflow refused the input.
            ModelFailedError: the model raised.
            PredictorDiedError, PredictorHangsError: this predictor is of no use any more.
        """
        assert self._line is not None
        try:
            message = self._exchange.write(batch)
        except OSError as error:
            raise PredictorDiedError(str(error)) from error
        self._line.send(message)
        answer = await self._answer(timeout_s)
        if answer.get("ok") is not True:
            if answer.get("caller") is True:
                raise RefusedError(str(answer.get("message"))[:_SHOWN])
            raise ModelFailedError(f"the model failed on this input: {_said(answer)}")
        try:
            result = self._exchange.read(answer)
        except BrokenAnswerError as error:
            raise PredictorDiedError(f"its answer cannot be read: {error}") from error
        self._exchange.trim()
        self.answered += 1
        seconds = answer.get("predict_s")
        return result, seconds if isinstance(seconds, float) else 0.0

    async def close(self) -> None:
        """End the process and free what belongs to it."""
        await asyncio.to_thread(self._process.end)
        if self._line is not None:
            self._line.close()
        self._process.channel.close()
        self._exchange.close()

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._line is not None
        try:
            async with asyncio.timeout(timeout_s):
                return await self._line.receive()
        except TimeoutError:
            raise PredictorHangsError(f"no answer within {timeout_s:g} s") from None
        except ConnectionError as error:
            await asyncio.to_thread(self._process.wait, _DEATH_S)
            await asyncio.to_thread(self._process.end)
            raise PredictorDiedError(f"{error}; {self._last_words()}") from error

    def _last_words(self) -> str:
        process = self._process
        how = process.signal or f"exit code {process.exit_code}"
        lines = "\n".join(process.last_lines()[-_LOG_LINES:])
        return f"the process ended with {how}" + (f"; it wrote last:\n{lines}" if lines else "")


class _Line(asyncio.Protocol):
    """Messages of `flops_worker.channel` on an event loop: one request, one answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._waiter: asyncio.Future[dict[str, Any]] | None = None
        self._lost: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no such class

    def send(self, message: dict[str, Any]) -> None:
        assert self._transport is not None
        body = orjson.dumps(message)
        self._transport.write(len(body).to_bytes(_LENGTH, "big") + body)

    async def receive(self) -> dict[str, Any]:
        """Raises ConnectionError when the other side is gone or sends what is no message."""
        self._waiter = asyncio.get_running_loop().create_future()
        if self._lost is not None:
            self._lose(self._lost)
        else:
            self._look()
        return await self._waiter

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._waiter is None or self._waiter.done():
            self._lose("it sent what nobody asked for")
            self.close()
        else:
            self._look()

    def eof_received(self) -> None:
        self._lose("the channel was closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("the channel was closed")

    def _look(self) -> None:
        """Hand over the message, if it is complete."""
        length = int.from_bytes(self._received[:_LENGTH], "big")
        if len(self._received) >= _LENGTH and length > channel.MAX_MESSAGE_BYTES:
            self._lose("it sent a message that is too long")
            self.close()
        if len(self._received) < _LENGTH + length or len(self._received) < _LENGTH:
            return
        try:
            message = json.loads(self._received[_LENGTH:])
        except (ValueError, RecursionError):
            message = None
        self._received.clear()
        if isinstance(message, dict) and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(message)
        else:
            self._lose("it sent what is no message")
            self.close()

    def _lose(self, reason: str) -> None:
        self._lost = self._lost or reason
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ConnectionError(self._lost))


def _said(answer: dict[str, Any]) -> str:
    return f"{str(answer.get('type'))[:70]}: {str(answer.get('message'))[:_SHOWN]}"
