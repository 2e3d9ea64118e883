"""The front process: listens, starts the predictors, says when the model answers, and ends gracefully."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flops.core.errors import FlopsError, InvalidInputError, UnavailableError
from flops.serving import scoring
from flops.serving.app import App
from flops.serving.config import ServingConfig
from flops.serving.metrics import Metrics
from flops.serving.openinference import OpenInference
from flops.serving.pool import Pool
from flops.serving.predictor import PredictorSettings
from flops.serving.scoring import Scoring
from flops.serving.signature import ModelCard, read_model

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(config: ServingConfig) -> None:
    """Serve one model until told to end (SIGTERM, SIGINT); what was accepted by then is still answered.

    Raises:
        FlopsError: the configuration cannot be used, the address is taken, or the model cannot be loaded.
    """
    if config.ready_file is not None:  # that of a server that was killed
        Path(config.ready_file).unlink(missing_ok=True)
    card = read_model(Path(config.model))
    counts = Metrics()
    limits = config.limits
    pool = Pool(
        PredictorSettings(
            model=Path(config.model),
            python=Path(config.python),
            kind=config.kind,
            threads=config.threads,
            memory_mb=config.memory_mb,
            isolate=config.isolate,
            log=None if config.log is None else Path(config.log),
            load_timeout_s=config.load_timeout_s,
        ),
        predictors=config.predictors,
        batching=config.batching,
        request_timeout_s=limits.request_timeout_s,
        metrics=counts,
    )
    reader = Scoring(card.signature, max_rows=limits.rows, ignore_extra_columns=config.ignore_extra_columns)
    app = App(
        pool,
        reader,
        OpenInference(card, reader, name=config.name, version=config.version),
        counts,
        limits,
        name=config.name,
        version=config.version,
        mlflow_version=card.mlflow_version,
        secret=config.secret(),
    )
    listening = _listen(config)
    scheme = "http" if config.tls is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{scheme}://{host}:{listening.getsockname()[1]}"
    server = _Server(_uvicorn_config(config, app))
    serving = asyncio.create_task(server.serve([listening]))
    loading = asyncio.create_task(_load(config, pool, reader, card))
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, server.end)
    try:
        await asyncio.wait((serving, loading), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            app.warm = True
            with _said(config, url):
                await serving
        else:
            serving.result()
    finally:
        server.end()
        loading.cancel()
        await asyncio.gather(serving, loading, return_exceptions=True)
        await pool.close()


async def _load(config: ServingConfig, pool: Pool, reader: Scoring, card: ModelCard) -> None:
    """Load the model, and let it answer its own example: first answers are slow, and the first may fail."""
    await pool.start()
    if card.example is None:
        return
    try:
        await pool.ask(reader.question(orjson.dumps(card.example), scoring.JSON))
    except FlopsError as error:
        log.warning("model %s does not answer its own input example: %s", config.name, error)


@contextlib.contextmanager
def _said(config: ServingConfig, url: str) -> Iterator[None]:
    """Say that the model answers, for as long as it does."""
    log.info("model %s, version %s, answers at %s", config.name, config.version, url)
    if config.ready_file is None:
        yield
        return
    path = Path(config.ready_file)
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_text(json.dumps({"url": url, "pid": os.getpid()}))
        temporary.rename(path)
    except OSError as error:
        raise UnavailableError(f"the ready file '{path}' cannot be written: {error}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _listen(config: ServingConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UnavailableError(
            f"the server cannot listen on {config.host}:{config.port}: {error} - choose another port"
        ) from error


def _uvicorn_config(config: ServingConfig, app: App) -> uvicorn.Config:
    tls = config.tls
    result = uvicorn.Config(
        app,
        http=_connection(config),
        ws="none",
        lifespan="off",
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        log_config=None,
        access_log=config.access_log,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.grace_s)),
        ssl_certfile=None if tls is None else tls.cert,
        ssl_keyfile=None if tls is None else tls.key,
    )
    try:
        result.load()
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(
            f"the certificate of model {config.name} cannot be used: {error} - give PEM files of a pair"
        ) from error
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return result


class _Server(uvicorn.Server):
    """Leaves signals to us: its own would end the process by the signal, not with code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.should_exit = True


def _connection(config: ServingConfig) -> type[HttpToolsProtocol]:
    """uvicorn's connection, with the limits that it lacks."""
    limits = config.limits

    class Connection(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = True
        _silence: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._silence = self.loop.call_later(limits.receive_timeout_s, self._end_of_patience)

        def connection_lost(self, exc: Exception | None) -> None:
            self._heard()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > limits.header_bytes and not self.transport.is_closing():
                self.send_400_response("The request's headers are too long.")

        def on_message_begin(self) -> None:
            if not self._in_head:
                self._head_bytes = 0
            self._in_head = True
            if self._silence is None:
                self._silence = self.loop.call_later(limits.receive_timeout_s, self._end_of_patience)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._heard()
            super().on_headers_complete()

        def _heard(self) -> None:
            if self._silence is not None:
                self._silence.cancel()
                self._silence = None

        def _end_of_patience(self) -> None:
            self._silence = None
            self.transport.close()

    return Connection
